"""The digits study: train what is missing, measure every method, write results/digits.

    python -m digits.study            # hours; run it again after an interruption and it goes on (`make
    study`) python -m digits.study --quick    # ten minutes: fewer samples, seeds and speeds, into
    results/digits-quick

`plan` says what is trained and measured, in the order in which it is done; each row of `study.json` holds the
command that measures it again, and the one that trained its router. Trainings and rows that are already there
are not repeated. Leaves: study.json, table.md, report.html, routers/, curves/, and rows/ (one file a row).
"""

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch

import cli
import methods
import report
import train_router
from baselines import random_schedule
from digits import measure
from digits.classifier import Judge
from files import replacing
from models import DiT
from router import find_router, load_router, save_router
from sampling import DIGITS_MODEL, load_model

ROOT = Path(__file__).parents[1]
RANDOM_CURS = np.arange(0.005, 0.9, 0.0025)  # among which `random` finds a speed
ABLATION_STEPS, ABLATION_SPEED = 10, "1.96"
MILD = 1.25  # a third speed for Learning-to-Cache, which can reuse every other step at most


@dataclass(frozen=True)
class Speed:
    """One speed-up by MACs at which methods are compared, and what reaches it without training."""

    target: float
    interval: str  # FORA's
    steps: int  # of the shorter chain
    l2c_target: float | None = None  # for even rows alone; None: out of its reach


SPEEDS = {
    10: [
        Speed(1.25, "1.25", 8, 1.25),
        Speed(1.42, "4/3", 7, 1.42),
        Speed(1.96, "2", 5, 1.92),
        Speed(2.44, "3", 4),
    ],
    20: [
        Speed(1.25, "1.25", 16, 1.25),
        Speed(1.52, "1.5", 13, 1.52),
        Speed(1.96, "2", 10, 1.92),
        Speed(2.77, "3", 7),
    ],
    50: [
        Speed(1.25, "1.25", 40, 1.25),
        Speed(1.5, "1.5", 33, 1.5),
        Speed(1.96, "2", 25, 1.92),
        Speed(2.77, "3", 18),
    ],
}


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured. updates: of each router row."""

    samples: int
    samples_in_readme: int
    seeds: dict[int, int]
    speeds: dict[int, list[Speed]]
    updates: dict[int, int]
    lr: float
    ablations: bool


FULL = Scale(2000, 5000, {10: 3, 20: 3, 50: 1}, SPEEDS, {10: 100, 20: 70, 50: 70}, 0.1, True)
QUICK = Scale(
    200, 200, {10: 1, 20: 1, 50: 1}, {steps: speeds[2:3] for steps, speeds in SPEEDS.items()},
    {10: 30, 20: 30, 50: 20}, 0.2, False,
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A training (its id names the router) or a row. arguments: of train_router.py or digits.measure."""

    id: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    facts: dict = field(default_factory=dict, hash=False, compare=False)
    is_training: bool = False


# ---- the plan --------------------------------------------------------------------------------------


class Plan:
    """Collects tasks in the order in which they are to be done; a training is asked for by its first row."""

    def __init__(self, folder: Path, scale: Scale):
        self.routers, self.scale = Path(os.path.relpath(folder / "routers", ROOT)), scale
        self.tasks: dict[str, Task] = {}

    def train(
        self, name: str, num_steps: int, target: tuple[str, float], seed: int, *flags, **changes
    ) -> str:
        """A training of `name` (harmonica, l2c, ...); returns its id. changes: updates=, lr=, cfg_scale=."""
        kind, value = target
        cfg_scale, lr = changes.get("cfg_scale", 1.0), changes.get("lr", self.scale.lr)
        updates = changes.get("updates", self.scale.updates[num_steps])
        id = f"{name}-T{num_steps}-{kind}{value:g}-s{seed}" + (f"-cfg{cfg_scale:g}" if cfg_scale != 1 else "")
        rows = num_steps // 2 if name == "l2c" else num_steps
        arguments = ["--model", DIGITS_MODEL, "--num-sampling-steps", num_steps, f"--target-{kind}", value]
        arguments += [
            "--global-seed",
            seed,
            "--lr",
            lr,
            "--max-steps",
            updates * rows,
            "--global-batch-size",
            8,
        ]
        if name.startswith("l2c"):
            limit = name == "l2c" and value > 1.9  # all that even rows can save: begin with a strong pull
            arguments += ["--method", "l2c", "--data", "digits", "--l1", 3e-3 if limit else 1e-4]
            arguments += ["--every-row"] if name == "l2c-every-row" else []
        else:  # a refresh of lambda costs T trajectories: one every T / 2, or ten where T is small
            arguments += ["--cfg-scale", cfg_scale, "--l1", 1e-6]
            arguments += ["--lambda-c", num_steps * max(10, num_steps // 2)]
        arguments += ["--log-every", 5 * num_steps, "--ckpt-every", 500, *flags]
        self.tasks.setdefault(id, Task(id, tuple(map(str, arguments)), is_training=True))
        return id

    def row(self, method: str, num_steps: int, flags: list, router: str | None = None, **facts) -> None:
        """A row; facts (speed, train_seed, group, variant, cfg_scale, sampler) go into it as they are."""
        cfg_scale, sampler = facts.pop("cfg_scale", 1.0), facts.pop("sampler", "ddim")
        id = "-".join(str(part) for part in (method, f"T{num_steps}", *facts.values()) if part is not None)
        id += (f"-cfg{cfg_scale:g}" if cfg_scale != 1 else "") + ("-ddpm" if sampler == "ddpm" else "")
        speed, seed = facts.get("speed"), facts.get("train_seed")
        shown = method == "uncached" or (speed == "1.96" and seed in (None, 0) and "group" not in facts)
        shown = shown and num_steps < 50 and sampler == "ddim"
        samples = self.scale.samples_in_readme if shown and cfg_scale == 1 else self.scale.samples
        arguments = ["--num-sampling-steps", num_steps, "--cfg-scale", cfg_scale, "--samples", samples]
        arguments += (["--p-sample"] if sampler == "ddpm" else []) + flags
        needs = []
        if router:
            arguments += ["--path", self.routers / f"{router}.safetensors"]
            needs.append(router)
        if method != "uncached":
            plain = f"uncached-T{num_steps}" + (f"-cfg{cfg_scale:g}" if cfg_scale != 1 else "")
            plain += "-ddpm" if sampler == "ddpm" else ""
            if plain not in self.tasks:
                self.row("uncached", num_steps, [], cfg_scale=cfg_scale, sampler=sampler)
            needs.append(plain)
        facts = {"method": method, "router": f"routers/{router}.safetensors" if router else None} | facts
        self.tasks.setdefault(id, Task(id, tuple(map(str, arguments)), tuple(needs), facts))

    def static(self, num_steps: int, speed: Speed, cfg_scale: float = 1.0) -> None:
        """What nobody trains, at one speed."""
        name = {"speed": f"{speed.target:g}", "cfg_scale": cfg_scale}
        self.row(
            "fewer-steps", num_steps, ["--accelerate-method", "fewer-steps", "--steps", speed.steps], **name
        )
        interval = ["--interval", speed.interval]
        self.row("fora", num_steps, ["--accelerate-method", "fora", *interval], **name)
        if speed.target == MILD:
            return
        taylor = ["--accelerate-method", "taylor-fora", *interval, "--order"]
        self.row("taylor-fora", num_steps, [*taylor, 1], **name)
        self.row("taylor2-fora", num_steps, [*taylor, 2], **name)

    def random(self, num_steps: int, speed: Speed, seed: int) -> None:
        cur = random_cur(num_steps, speed.target, seed)
        flags = ["--accelerate-method", "random", "--cur", f"{cur:.4f}", "--schedule-seed", seed]
        self.row("random", num_steps, flags, speed=f"{speed.target:g}", train_seed=seed)

    def harmonica(
        self, num_steps: int, speed: Speed, seed: int, name: str = "harmonica", flags: tuple = (), **changes
    ) -> str:
        facts = {"speed": f"{speed.target:g}", "train_seed": seed} | changes.pop("facts", {})
        cfg_scale = changes.get("cfg_scale", 1.0)
        router = self.train(name, num_steps, ("speedup", speed.target), seed, *flags, **changes)
        self.row(name, num_steps, dynamic(), router, cfg_scale=cfg_scale, **facts)
        return router

    def trained(self, num_steps: int, speed: Speed, seed: int) -> None:
        """All trained methods at one speed, from one seed."""
        facts = {"speed": f"{speed.target:g}", "train_seed": seed}
        if speed.l2c_target:
            router = self.train("l2c", num_steps, ("speedup", speed.l2c_target), seed)
            self.row("l2c", num_steps, dynamic("l2c"), router, **facts)
        if speed.target == MILD:
            return
        router = self.harmonica(num_steps, speed, seed)
        self.row("taylor-harmonica", num_steps, dynamic("taylor-dynamiclayer"), router, **facts)
        self.harmonica(num_steps, speed, seed, "harmonica-paper", ("--proxy", "paper"))
        router = self.train("l2c-every-row", num_steps, ("speedup", speed.target), seed)
        self.row("l2c-every-row", num_steps, dynamic("l2c"), router, **facts)

    def compare(self, num_steps: int, seeds: range | None = None) -> None:
        """All methods at all speeds; what is planned already stays where it is."""
        for seed in seeds or range(self.scale.seeds[num_steps]):
            for speed in self.scale.speeds[num_steps]:
                if seed == 0:
                    self.static(num_steps, speed)
                if speed.target != MILD:
                    self.random(num_steps, speed, seed)
                self.trained(num_steps, speed, seed)

    def ablations(self) -> None:
        """At T = 10 and one speed, seed 0; `group` says of what."""
        num_steps = ABLATION_STEPS
        (speed,) = (one for one in SPEEDS[num_steps] if f"{one.target:g}" == ABLATION_SPEED)
        router = self.harmonica(num_steps, speed, 0)  # the same as above, no second training
        for group, name, flags in (
            ("proxy", "harmonica-no-proxy", ("--proxy", "none")),
            ("router-train", "harmonica-ste", ("--router-train", "ste")),
            ("data-loss", "harmonica-eps", ("--data-loss", "eps")),
            ("cost", "harmonica-macs", ("--cost", "macs")),
        ):
            for seed in range(self.scale.seeds[num_steps]):
                self.harmonica(num_steps, speed, seed, name, flags, facts={"group": group})
        for threshold in (0.02, 0.05, 0.2, 0.3, 0.5, 0.7, 0.9):
            flags = [*dynamic(), "--thres", threshold]
            self.row(
                "harmonica", num_steps, flags, router, train_seed=0, group="threshold", variant=threshold
            )
        for lr, updates in ((0.3, 100), (0.03, 330)):
            name, facts = f"harmonica-lr{lr}", {"group": "lr"}
            self.harmonica(num_steps, speed, 0, name, lr=lr, updates=updates, facts=facts)

        self.static(num_steps, speed, cfg_scale=1.5)
        facts = {"speed": f"{speed.target:g}", "train_seed": 0}
        guided = self.harmonica(num_steps, speed, 0, cfg_scale=1.5)
        self.harmonica(num_steps, speed, 0, "harmonica-paper", ("--proxy", "paper"), cfg_scale=1.5)
        l2c = f"l2c-every-row-T{num_steps}-speedup{speed.target:g}-s0"
        self.row("l2c-every-row", num_steps, dynamic("l2c"), l2c, **facts, cfg_scale=1.5)
        facts["group"] = "transfer"
        self.row("harmonica", num_steps, dynamic(), guided, **facts, variant="trained-at-1.5")
        self.row("harmonica", num_steps, dynamic(), router, **facts, variant="trained-at-1", cfg_scale=1.5)
        self.row(
            "harmonica", num_steps, dynamic(), router, **facts, variant="trained-with-ddim", sampler="ddpm"
        )
        fora = ["--accelerate-method", "fora", "--interval", speed.interval]
        self.row("fora", num_steps, fora, speed=f"{speed.target:g}", group="transfer", sampler="ddpm")

    def targets(self) -> None:
        """Whether `--target-cur` reaches what it is asked for."""
        for cur in (0.25, 0.4, 0.55):
            for seed in range(3):
                router = self.train("harmonica", 10, ("cur", cur), seed)
                self.row("harmonica", 10, dynamic(), router, train_seed=seed, group="target-cur", variant=cur)

    def full_length(self) -> None:
        """The published 20,000 train steps at the published learning rate."""
        for speed in (one for one in SPEEDS[10] if f"{one.target:g}" == ABLATION_SPEED):
            for name, flags in (("harmonica", ()), ("harmonica-paper", ("--proxy", "paper"))):
                changes = {"lr": 0.01, "updates": 2000, "facts": {"group": "full-length"}}
                self.harmonica(10, speed, 0, f"{name}-20k", flags, **changes)


def dynamic(method: str = "dynamiclayer") -> list[str]:
    return ["--accelerate-method", method]


@cache
def random_cur(num_steps: int, speedup: float, seed: int) -> float:
    """The CUR at which a random schedule of this seed comes closest to a speed-up by MACs."""
    model = digits_model()

    def distance(cur: float) -> float:
        return abs(random_schedule(num_steps, model.num_branches, cur, seed).speedup_macs(model) - speedup)

    most = (num_steps - 1) / num_steps
    return float(min((cur for cur in RANDOM_CURS if cur < most), key=distance))


def plan(folder: Path, scale: Scale) -> list[Task]:
    """All tasks in order: what is cheap and what is most asked for comes first."""
    tasks = Plan(folder, scale)
    tasks.compare(10)
    if scale.ablations:
        tasks.ablations()
        tasks.targets()
    tasks.compare(20, range(1))
    tasks.compare(50)
    if scale.ablations:
        tasks.full_length()
    tasks.compare(20)
    return list(tasks.tasks.values())


# ---- doing it --------------------------------------------------------------------------------------


@cache
def digits_model() -> DiT:
    return load_model(DIGITS_MODEL)


@cache
def judge() -> Judge:
    return Judge()


def is_done(folder: Path, task: Task) -> bool:
    if task.is_training:
        return (folder / "routers" / f"{task.id}.safetensors").exists()
    path = folder / "rows" / f"{task.id}.json"
    return path.exists() and json.loads(path.read_text())["arguments"] == list(task.arguments)


def perform(folder: Path, task: Task) -> str:
    """Do one task in this process; returns a word on the outcome."""
    with quietly(folder / "work" / f"{task.id}.log"):
        return train(folder, task) if task.is_training else measure_row(folder, task)


@contextlib.contextmanager
def quietly(log: Path) -> Iterator[None]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def train(folder: Path, task: Task) -> str:
    """Run train_router.py's main, keep the router without its training state, and its curves."""
    results = folder / "work" / task.id
    where = ["--results-dir", str(results), "--resume", "auto", "--device", "cpu"]
    train_router.main(train_router.parse_args([*task.arguments, *where]))
    (run,) = results.glob("[0-9]*-*")
    router = load_router(find_router(run))
    (folder / "curves").mkdir(exist_ok=True)
    shutil.copy(run / "metrics.jsonl", folder / "curves" / f"{task.id}.jsonl")
    save_router(folder / "routers" / f"{task.id}.safetensors", router)
    return f"CUR {100 * router.info['cur']:.2f} %, {router.info['speedup_macs']:.3f}x by MACs"


def measure_row(folder: Path, task: Task) -> str:
    args = measure.parse_args(list(task.arguments))
    model, method = digits_model(), methods.load_method(args, digits_model())
    uncached = folder / "work" / f"{'uncached' if method.name != 'none' else task.id}.npz"
    if method.name == "none":
        own = plain = measure.draw(args, model, method)
        with replacing(uncached) as temporary:
            np.savez(temporary, x_0=own.x_0.numpy(), latency_ms=own.latency_ms)
    else:
        with np.load(folder / "work" / f"{task.needs[-1]}.npz") as file:
            plain = measure.Drawn(torch.from_numpy(file["x_0"][: args.samples]), float(file["latency_ms"]))
        own = measure.draw(args, model, method)
    row = task.facts | measure.compare(args, model, judge(), method, own, plain)
    row |= {"command": f"python -m digits.measure {' '.join(task.arguments)}", "arguments": task.arguments}
    row |= {"id": task.id, "images": measure.pictures(own)}
    with replacing(folder / "rows" / f"{task.id}.json") as temporary:
        temporary.write_text(json.dumps(row, indent=1) + "\n")
    return (
        f"{row['speedup_macs']:.3f}x by MACs, MSE {row['mse']:.2e}, FD to uncached {row['fd_uncached']:.3f}"
    )


def start_worker() -> None:
    """One thread for the work; another that ends the process when the study is killed."""
    torch.set_num_threads(1)

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def perform_all(folder: Path, tasks: list[Task], workers: int) -> list[str]:
    """Everything that is not done, in order as far as needs allow; returns the ids of what failed."""
    # One thread a process is the most efficient; glibc's allocator would return and refault large blocks.
    os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(2**28)}
    done = {task.id for task in tasks if is_done(folder, task)}
    waiting, failed, running = [task for task in tasks if task.id not in done], [], {}
    print(f"{len(done)} of {len(tasks)} tasks are done; {workers} processes", flush=True)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        while waiting or running:
            ready = [task for task in waiting if set(task.needs) <= done]
            for task in ready[: workers - len(running)]:
                waiting.remove(task)
                running[pool.submit(perform, folder, task)] = task, time.monotonic()
            if not running:
                break  # what is left needs what failed
            finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                task, began = running.pop(future)
                try:
                    outcome = future.result()
                    done.add(task.id)
                except (ValueError, OSError) as error:
                    outcome = f"FAILED: {error}"
                    failed.append(task.id)
                seconds = time.monotonic() - began
                print(f"[{len(done)}/{len(tasks)}] {task.id}: {outcome} ({seconds:.0f} s)", flush=True)
    return failed + [task.id for task in waiting]


def collect(folder: Path, tasks: list[Task]) -> list[dict]:
    """The rows that are there, in the plan's order, each with the command that trained its router."""
    commands = {
        task.id: f"python train_router.py {' '.join(task.arguments)}" for task in tasks if task.is_training
    }
    rows = []
    for task in tasks:
        if not task.is_training and is_done(folder, task):
            row = json.loads((folder / "rows" / f"{task.id}.json").read_text())
            router = Path(row["router"]).stem if row["router"] else None
            rows.append(row | {"train_command": commands.get(router)})
    return rows


def write_results(folder: Path, tasks: list[Task]) -> None:
    rows = collect(folder, tasks)
    with replacing(folder / "study.json") as temporary:
        shown = [{k: v for k, v in row.items() if k not in ("images", "arguments")} for row in rows]
        temporary.write_text(json.dumps({"model": DIGITS_MODEL, "rows": shown}, indent=1) + "\n")
    report.write_study(folder, rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare all methods on the digits model.")
    parser.add_argument("--quick", action="store_true", help="ten minutes instead of hours")
    parser.add_argument("--results-dir", type=Path, help="default results/digits, or results/digits-quick")
    parser.add_argument(
        "--processes", type=cli.positive_int, default=os.cpu_count(), help="default: all cores"
    )
    parser.add_argument("--list", action="store_true", help="print the tasks and do nothing")
    parser.add_argument("--only", help="tasks whose id contains this, with what they need")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    folder = args.results_dir or ROOT / "results" / ("digits-quick" if args.quick else "digits")
    folder = folder.resolve()
    tasks = plan(folder, QUICK if args.quick else FULL)
    chosen = tasks
    if args.only:
        wanted = {task.id for task in tasks if args.only in task.id}
        needed = {need for task in tasks if task.id in wanted for need in task.needs}
        chosen = [task for task in tasks if task.id in wanted | needed]
    if args.list:
        for task in chosen:
            print("done " if is_done(folder, task) else "     ", task.id, *task.arguments)
        return
    os.chdir(ROOT)  # router paths in commands are relative to it
    for name in ("rows", "routers", "curves", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    failed = perform_all(folder, chosen, args.processes)
    write_results(folder, tasks)
    print(f"wrote {folder}/study.json, table.md and report.html")
    if failed:
        raise ValueError(f"not done: {', '.join(failed)}; see {folder}/work/*.log and run again")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    cli.run(main, parse_args())
