"""The digits study: train what is missing, measure every method, write results/digits.

    python -m study.run            # hours; after an interruption run it again (`make study`)
    python -m study.run --quick    # a quarter of an hour, into results/digits-quick

`study/plan.py` says what is trained and measured, in the order in which it is done; each row of `study.json`
holds the command that measures it again, and the one that trained its router. Trainings and rows that are
already there are not repeated. Leaves: study.json, table.md, report.html and pictures/; routers/; curves/,
rows/ and latency/ (what the report is made of); scratch/ (what can be deleted).
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch

import end_to_end.rounds
import training.rounds
from common import cli, devices, distributed, lifeline
from common.arrays import ArrayFile
from common.files import read_json, replacing, write_json
from common.identity import same_weights, weights_fingerprint
from examples.digits import MODEL
from examples.digits.classifier import Judge
from router import find_router, load_router, save_router
from study import measure
from study.measure import Measurement
from study.plan import FULL, QUICK, QUICK_RESULTS, RESULTS, ROOT, Task, digits_model, plan
from study.report import write_study
from study.tables import is_main
from training.arguments import parse_args as parse_training
from training.run import train as train_router
from training.settings import TrainSettings

HIDDEN = ("images", "arguments", "router_hash")  # of rows/ alone


@cache
def judge() -> Judge:
    return Judge()


def is_done(folder: Path, task: Task, weights: str | None = None) -> bool:
    """Whether its result is there: of these arguments, this router and these weights of the model.

    weights: the model's fingerprint, where many tasks are asked about.
    """
    path = folder / ("routers" if task.is_training else "rows") / task.file_name
    if not path.exists():
        return False
    weights = weights or weights_fingerprint(digits_model())
    try:
        if task.is_training:
            info = load_router(path).info
            found = info.get("train_arguments")
            return found == list(task.arguments) and same_weights(info["settings"]["weights"], weights)
        row = read_json(path)
    except (ValueError, KeyError) as error:
        print(f"{task.id} is done again: {error}", flush=True)
        return False
    found = row.get("arguments"), row.get("router_hash")
    wanted = list(task.arguments), router_hash(folder, task)
    return found == wanted and same_weights(row.get("weights"), weights)


def router_hash(folder: Path, task: Task) -> str | None:
    """Of the file that a row measures: a router that was trained anew is measured anew."""
    path = folder / (task.facts["router"] or "")
    return short_hash(path.read_bytes()) if path.is_file() else None


def short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def perform(folder: Path, task: Task) -> str:
    """Do one task in this process; returns a word on the outcome."""
    with quietly(folder / "scratch" / f"{task.id}.log"):
        return train(folder, task) if task.is_training else measure_row(folder, task)


@contextlib.contextmanager
def quietly(log: Path) -> Iterator[None]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def train(folder: Path, task: Task) -> str:
    """Train as train_router.py does, keep the router without its training state, and its curves."""
    results = folder / "scratch" / f"{task.id}-{short_hash(' '.join(task.arguments).encode())}"
    where = ["--results-dir", str(results), "--resume", "auto", "--device", "cpu"]
    settings = TrainSettings.from_arguments(parse_training([*task.arguments, *where]))
    rounds = training.rounds.ROUNDS | end_to_end.rounds.ROUNDS
    run = train_router(settings, rounds, distributed.start("cpu"), show=print)
    router = load_router(find_router(run))
    (folder / "curves").mkdir(exist_ok=True)
    if (run / "metrics.jsonl").exists():  # not in a very short training
        shutil.copy(run / "metrics.jsonl", folder / "curves" / f"{task.id}.jsonl")
    path = folder / "routers" / task.file_name
    save_router(path, router, train_arguments=task.arguments)
    return f"CUR {100 * router.info['cur']:.2f} %, {router.info['speedup_macs']:.3f}x by MACs"


def measure_row(folder: Path, task: Task) -> str:
    asked = Measurement.from_arguments(measure.parse_args(list(task.arguments)))
    model, method = digits_model(), asked.load(digits_model())
    own = plain = uncached_samples(folder, asked)
    if method.name != "none":
        own = measure.draw(asked, method.trajectory(model, asked.sampling))
    row = task.facts | measure.compare(asked, model, judge(), method, own, plain)
    row |= {"command": f"python -m study.measure {' '.join(task.arguments)}", "arguments": task.arguments}
    row |= {"id": task.id, "router_hash": router_hash(folder, task), "images": measure.pictures(own)}
    write_json(folder / "rows" / task.file_name, row)
    return (
        f"{row['speedup_macs']:.3f}x by MACs, MSE {row['mse']:.2e}, FD to uncached {row['fd_uncached']:.3f}"
    )


def uncached_samples(folder: Path, asked: Measurement) -> torch.Tensor:
    """x_0 that a row is compared with, from scratch/ where a row before drew as many."""
    sampling, model = asked.sampling, digits_model()
    setting = (
        f"T{sampling.num_sampling_steps}-cfg{sampling.cfg_scale:g}-{sampling.sampler}-seed{sampling.seed}"
    )
    path = folder / "scratch" / f"uncached-{weights_fingerprint(digits_model())}-{setting}.npy"
    with contextlib.suppress(OSError, ValueError):  # absent or damaged: drawn again
        x_0 = ArrayFile(path).read("arr_0", "f", "(n, C, H, W)")
        if len(x_0) >= asked.samples:
            return torch.from_numpy(x_0[: asked.samples])
    x_0 = measure.draw(asked, asked.uncached(model).trajectory(model, sampling))
    with replacing(path) as temporary:
        np.save(temporary, x_0.numpy())
    return x_0


def start_worker() -> None:
    """One thread for the work; the process ends when the study is killed."""
    lifeline.follow_starter()
    torch.set_num_threads(1)
    cli.keep_freed_memory()


def perform_all(folder: Path, tasks: list[Task], workers: int) -> list[str]:
    """Everything that is not done, in order as far as needs allow; returns the ids of what failed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread a process is the most efficient
    weights = weights_fingerprint(digits_model())
    done = {task.id for task in tasks if is_done(folder, task, weights)}
    waiting, failed, running = [task for task in tasks if task.id not in done], [], {}
    print(f"{len(done)} of {len(tasks)} tasks are done; {workers} processes", flush=True)
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=start_worker)
    with executor as pool, ending_children():
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
                except concurrent.futures.BrokenExecutor:
                    raise ValueError("a process ended abruptly, of too little memory?; run again") from None
                except Exception as error:  # one task's failure is not the others'
                    outcome = f"FAILED: {type(error).__name__}: {error}"
                    failed.append(task.id)
                seconds = time.monotonic() - began
                print(f"[{len(done)}/{len(tasks)}] {task.id}: {outcome} ({seconds:.0f} s)", flush=True)
    return failed + [task.id for task in waiting]


@contextlib.contextmanager
def ending_children() -> Iterator[None]:
    """Ctrl-C and SIGTERM end what is at work, too, instead of waiting for it; it goes on the next time."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        for child in multiprocessing.active_children():
            child.kill()
        raise


def measure_latencies(folder: Path, tasks: list[Task], repeats: int) -> None:
    """Latency of the main rows of seed 0 that have none yet, alone and in turn with uncached sampling.

    One number of steps after the other. A row whose router was trained anew is measured anew.
    """
    torch.set_num_threads(1)
    model, groups = digits_model(), {}
    for row in collect(folder, tasks):
        if is_main(row) and row.get("train_seed") in (None, 0):
            groups.setdefault(row["num_steps"], []).append(row)
    for num_steps, rows in sorted(groups.items()):
        path = folder / "latency" / f"T{num_steps}.json"
        there = read_latencies(path)
        plain = [row for row in rows if row["method"] == "uncached"]
        missing = [row for row in rows if row not in plain and row["speedup_latency"] is None]
        if not (plain and missing):
            continue
        print(f"latency of {len(missing)} rows at T = {num_steps}", flush=True)
        batches = []
        for row in plain + missing:
            asked = Measurement.from_arguments(measure.parse_args(row["arguments"]))
            trajectory = asked.load(model).trajectory(model, asked.sampling)
            batches.append(measure.timed_batch(asked, trajectory))
        plain_ms, *medians = measure.latencies(batches, repeats)
        measured = {plain[0]["id"]: (plain_ms, None)} if plain[0]["speedup_latency"] is None else {}
        measured |= {
            row["id"]: (ms, row.get("router_hash")) for row, ms in zip(missing, medians, strict=True)
        }
        found = {
            id: {
                "latency_ms": ms,
                "speedup_latency": plain_ms / ms,
                "latency_batch": measure.LATENCY_BATCH,
                "latency_repeats": repeats,
                "latency_hardware": devices.hardware(torch.device("cpu")),
                "router_hash": router_hash,
            }
            for id, (ms, router_hash) in measured.items()
        }
        write_json(path, there | found)


def read_latencies(path: Path) -> dict:
    """What `measure_latencies` wrote; a file that does not read is measured again."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return {}


def collect(folder: Path, tasks: list[Task]) -> list[dict]:
    """The rows that are there, in the plan's order, with their latency and the training's command."""
    latency = {}
    for path in (folder / "latency").glob("T*.json"):
        latency |= read_latencies(path)
    commands = {
        task.id: f"python train_router.py {' '.join(task.arguments)}" for task in tasks if task.is_training
    }
    rows, weights = [], weights_fingerprint(digits_model())
    for task in tasks:
        if not task.is_training and is_done(folder, task, weights):
            row = read_json(folder / "rows" / task.file_name)
            router = Path(row["router"]).stem if row["router"] else None
            measured = latency.get(task.id, {"router_hash": "of nothing yet"})
            if measured["router_hash"] != row.get("router_hash"):  # measured before a training anew
                measured = {"latency_ms": None, "speedup_latency": None}
            rows.append(row | measured | {"train_command": commands.get(router)})
    return rows


def write_results(folder: Path, tasks: list[Task]) -> None:
    rows = collect(folder, tasks)
    shown = [{k: v for k, v in row.items() if k not in HIDDEN} for row in rows]
    write_json(folder / "study.json", {"model": MODEL, "rows": shown})
    write_study(folder, rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare all methods on the digits model.")
    parser.add_argument("--quick", action="store_true", help="a quarter of an hour instead of hours")
    parser.add_argument("--results-dir", type=Path, help="default results/digits, or results/digits-quick")
    parser.add_argument(
        "--processes", type=cli.positive_int, default=os.cpu_count(), help="default: all cores"
    )
    parser.add_argument("--list", action="store_true", help="print the tasks and do nothing")
    parser.add_argument("--only", help="tasks whose id contains this, with what they need")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    folder = args.results_dir or QUICK_RESULTS if args.quick else RESULTS
    folder = folder.resolve()
    scale = QUICK if args.quick else FULL
    tasks = plan(folder, scale)
    chosen = tasks
    if args.only:
        wanted = {task.id for task in tasks if args.only in task.id}
        needed = {need for task in tasks if task.id in wanted for need in task.needs}
        chosen = [task for task in tasks if task.id in wanted | needed]
        if not chosen:
            raise ValueError(f"--only {args.only!r}: no task's id contains it; --list shows them")
    if args.list:
        weights = weights_fingerprint(digits_model())
        for task in chosen:
            print("done " if is_done(folder, task, weights) else "     ", task.id, *task.arguments)
        return
    os.chdir(ROOT)  # router paths in commands are relative to it
    for name in ("rows", "routers", "curves", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    try:
        failed = perform_all(folder, chosen, args.processes)
        measure_latencies(folder, tasks, scale.repeats)
    finally:  # what is done can be looked at, whatever ended the rest
        write_results(folder, tasks)
    print(f"wrote {folder}/study.json, table.md and report.html")
    if failed:
        raise ValueError(f"not done: {', '.join(failed)}; see {folder}/scratch/*.log and run again")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    cli.run(main, parse_args())
