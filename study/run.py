"""A study: train the routers that are missing, measure every method, write tables and a report.

    python -m study.run --quick    # the digits: a quarter of an hour, into results/digits-quick
    python -m study.run            # hours, into results/digits; after an interruption run it again
    python -m study.run --results-dir study/results/digits    # goes on with the committed study
    python -m study.run --example emoji    # the same for another example, into results/emoji-study

`study/plan.py`, or `study/emoji_plan.py`, says what is trained and measured and in which order,
`study/store.py` which file holds what. Each row of `study.json` holds the command that measures it again, and
the one that trained its router. Trainings and rows that are there are not repeated. One command at a time
writes in a folder.
"""

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from common import cli, devices, distributed, lifeline
from common.arrays import ArrayFile
from common.files import replacing, write_json
from end_to_end.any_speed import ROUNDS as END_TO_END_ROUNDS
from router import find_router, load_router
from study import emoji_plan, measure
from study.measure import Measurement
from study.plan import FULL, QUICK, Scale, Task, plan
from study.report import page_folder, write_page, write_table
from study.store import Study, router_hash, short_hash
from study.subjects import DIGITS, ROOT, SUBJECTS, Subject, fingerprint, judge, parts
from study.tables import is_main, shows_training
from training.arguments import parse_args as parse_training
from training.rounds import ROUNDS
from training.run import train as train_router
from training.settings import TrainSettings

HIDDEN = ("images", "router_hash")  # of the rows' records, not in study.json


def subject_of(tasks: list[Task]) -> Subject:
    """What a plan is about."""
    return SUBJECTS[next(task.row.example for task in tasks if task.row)]


# ---- in a worker -----------------------------------------------------------------------------------


def start_worker() -> None:
    """One thread for the work; the process ends when the study is killed."""
    lifeline.follow_starter()
    torch.set_num_threads(1)
    cli.keep_freed_memory()


def perform(folder: Path, task: Task) -> Path | dict:
    """Do one task in this process: a training's run folder, or a row's record."""
    log = folder / "scratch" / f"{task.id}.log"
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return train(folder, task) if task.is_training else measure_row(folder, task)


def train(folder: Path, task: Task) -> Path:
    """Train a router, or go on with it; returns the run's folder."""
    results = folder / "scratch" / f"{task.id}-{short_hash(' '.join(task.arguments))}"
    where = ["--results-dir", str(results), "--resume", "auto", "--device", "cpu"]
    settings = TrainSettings.from_arguments(parse_training([*task.arguments, *where]))
    return train_router(settings, ROUNDS | END_TO_END_ROUNDS, distributed.start("cpu"), show=print)


def measure_row(folder: Path, task: Task) -> dict:
    asked = Measurement.from_arguments(measure.parse_args(task.arguments))
    model = parts(asked.subject)[0]
    method = asked.load(model)
    own = plain = uncached_samples(folder, asked)
    if method.name != "none":
        own = measure.draw(asked, method.trajectory(model, asked.sampling))
    row = task.row.facts | measure.compare(asked, model, judge(asked.subject), method, own, plain)
    measured = router_hash(load_router(task.settings["path"])) if task.row.training else None
    row |= {"command": task.command, "id": task.id, "router_hash": measured}
    return row | {"images": measure.pictures(asked.subject, own)}


def uncached_samples(folder: Path, asked: Measurement) -> torch.Tensor:
    """x_0 that a row is compared with, from scratch/ where a row before drew as many."""
    sampling, model = asked.sampling, parts(asked.subject)[0]
    chain = f"T{sampling.num_sampling_steps}-cfg{sampling.cfg_scale:g}-{sampling.sampler}"
    path = folder / "scratch" / f"uncached-{fingerprint(asked.subject)}-{chain}-seed{sampling.seed}.npy"
    with contextlib.suppress(OSError, ValueError):  # absent or damaged: drawn again
        x_0 = ArrayFile(path).read("arr_0", "f", "(n, C, H, W)")
        if len(x_0) >= asked.samples:
            return torch.from_numpy(x_0[: asked.samples])
    x_0 = measure.draw(asked, asked.uncached(model).trajectory(model, sampling))
    with replacing(path) as temporary:
        np.save(temporary, x_0.numpy())
    return x_0


# ---- in the command's own process ------------------------------------------------------------------


def keep(study: Study, task: Task, result: Path | dict, with_curve: bool) -> str:
    """Add a task's result to the study; returns a word on the outcome."""
    if not task.is_training:
        study.rows.add(result)
        figures = result["speedup_macs"], result["mse"], result["fd_uncached"]
        return "{:.3f}x by MACs, MSE {:.2e}, FD to uncached {:.3f}".format(*figures)
    router = load_router(find_router(result))
    study.add_router(task, router)
    log = result / "metrics.jsonl"
    if with_curve and log.exists():  # a very short training has none
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        study.curves.add({"id": task.id, "lines": lines})
    return f"CUR {100 * router.info['cur']:.2f} %, {router.info['speedup_macs']:.3f}x by MACs"


def drawn_trainings(tasks: list[Task]) -> set[str]:
    """The trainings whose curves the report draws."""
    rows = [task.row for task in tasks if task.row and task.row.training]
    return {
        row.training.id for row in rows
        if shows_training(row.facts | {"sampler": row.sampler, "cfg_scale": row.cfg_scale})
    }  # fmt: skip


def perform_all(study: Study, chosen: list[Task], tasks: list[Task], workers: int) -> list[str]:
    """Do what is not done of the chosen tasks, in order as far as needs allow; returns the ids that failed.

    tasks: the whole plan.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread a process is the most efficient
    done, drawn = study.done(chosen, fingerprint(subject_of(tasks))), drawn_trainings(tasks)
    waiting, failed, running = [task for task in chosen if task.id not in done], [], {}
    print(f"{len(done)} of {len(chosen)} tasks are done; {workers} processes", flush=True)
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=start_worker)
    with executor as pool, ending_children():
        while waiting or running:
            ready = [task for task in waiting if set(task.needs) <= done]
            for task in ready[: workers - len(running)]:
                waiting.remove(task)
                running[pool.submit(perform, study.folder, task)] = task, time.monotonic()
            if not running:
                break  # what is left needs what failed
            finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                task, began = running.pop(future)
                try:
                    outcome = keep(study, task, future.result(), with_curve=task.id in drawn)
                    done.add(task.id)
                except concurrent.futures.BrokenExecutor:
                    raise ValueError("a process ended abruptly, of too little memory?; run again") from None
                except Exception as error:  # one task's failure is not the others'
                    outcome = f"FAILED: {type(error).__name__}: {error}"
                    failed.append(task.id)
                seconds = time.monotonic() - began
                print(f"[{len(done)}/{len(chosen)}] {task.id}: {outcome} ({seconds:.0f} s)", flush=True)
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


def measure_latencies(study: Study, tasks: list[Task], repeats: int) -> None:
    """Latency of the rows of the comparison (training seed 0) that have none yet, in turn with uncached.

    One number of steps after the other, while nothing else runs. A row whose router was trained anew is
    measured anew.
    """
    torch.set_num_threads(1)
    model, groups = parts(subject_of(tasks))[0], {}
    for row in collect(study, tasks):
        if is_main(row) and row.get("train_seed") in (None, 0):
            groups.setdefault(row["num_steps"], []).append(row)
    for num_steps, rows in sorted(groups.items()):
        plain = [row for row in rows if row["method"] == "uncached"]
        missing = [row for row in rows if row not in plain and row["speedup_latency"] is None]
        if not (plain and missing):
            continue
        print(f"latency of {len(missing)} rows at T = {num_steps}", flush=True)
        batches = []
        for row in plain + missing:
            asked = Measurement.from_arguments(measure.parse_args(arguments_of(row["command"])))
            trajectory = asked.load(model).trajectory(model, asked.sampling)
            batches.append(measure.timed_batch(asked, trajectory))
        plain_ms, *medians = measure.latencies(batches, repeats)
        measured = list(zip(missing, medians, strict=True))
        measured += [(plain[0], plain_ms)] if plain[0]["speedup_latency"] is None else []
        for row, latency_ms in measured:
            study.latencies.add({
                "id": row["id"],
                "latency_ms": latency_ms,
                "speedup_latency": plain_ms / latency_ms,
                "latency_batch": measure.LATENCY_BATCH,
                "latency_repeats": repeats,
                "latency_hardware": devices.hardware(torch.device("cpu")),
                "router_hash": row["router_hash"],
            })  # fmt: skip


def arguments_of(command: str) -> list[str]:
    """The words after `python -m MODULE`."""
    return shlex.split(command)[3:]


def collect(study: Study, tasks: list[Task]) -> list[dict]:
    """The rows that are there, in the plan's order, with their latency and the training's command."""
    rows, latencies = study.rows.read(), study.latencies.read()
    done = study.done(tasks, fingerprint(subject_of(tasks)))
    train_commands = {task.id: task.command for task in tasks if task.is_training}
    found = []
    for task in tasks:
        if task.row and task.id in done:
            row, latency = rows[task.id], latencies.get(task.id)
            if latency is None or latency["router_hash"] != row["router_hash"]:  # of an earlier router
                latency = {"latency_ms": None, "speedup_latency": None}
            training = task.row.training
            found.append(row | latency | {"train_command": train_commands[training.id] if training else None})
    return found


def write_results(study: Study, tasks: list[Task]) -> None:
    """study.json, table.md and the report of the rows that are there."""
    rows, ids = collect(study, tasks), [task.id for task in tasks]
    for records in (study.rows, study.latencies, study.curves):
        if records.path.is_file():
            records.tidy(ids)
    shown = [{k: v for k, v in row.items() if k not in HIDDEN} for row in rows]
    write_json(study.folder / "study.json", {"model": subject_of(tasks).model, "rows": shown})
    if rows:
        write_table(study.folder, rows)
        write_page(study, page_folder(study.folder), rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare all methods on an example's model.")
    parser.add_argument("--example", choices=SUBJECTS, default=DIGITS.name, help="default: digits")
    parser.add_argument("--quick", action="store_true", help="a quarter of an hour instead of hours")
    parser.add_argument(
        "--results-dir",
        type=Path,
        help="folder of the study; default: results/digits, with --quick results/digits-quick, of another "
        "example results/EXAMPLE-study and results/EXAMPLE-study-quick",
    )
    parser.add_argument(
        "--processes", type=cli.positive_int, default=os.cpu_count(), help="default: one a core"
    )
    parser.add_argument("--list", action="store_true", help="print the tasks and whether they are done")
    parser.add_argument("--only", metavar="TEXT", help="tasks whose id contains this, and what they need")
    return parser.parse_args()


def choose(tasks: list[Task], text: str | None) -> list[Task]:
    """The tasks whose id contains a text, and what they need. Raises ValueError where there are none."""
    if text is None:
        return tasks
    chosen = {task.id for task in tasks if text in task.id}
    if not chosen:
        raise ValueError(f"--only {text!r}: no task's id contains it; --list shows them")
    for task in reversed(tasks):  # what is needed stands before what needs it
        if task.id in chosen:
            chosen |= set(task.needs)
    return [task for task in tasks if task.id in chosen]


def chosen_plan(example: str, quick: bool) -> tuple[Callable[[Path, Scale], list[Task]], Scale]:
    """The plan of an example's study, and how much of it."""
    make, full, short = {
        DIGITS.name: (plan, FULL, QUICK),
        "emoji": (emoji_plan.plan, emoji_plan.FULL, emoji_plan.QUICK),
    }[example]
    return make, short if quick else full


def main(args: argparse.Namespace) -> None:
    folder = (args.results_dir or SUBJECTS[args.example].results(args.quick)).resolve()
    make, scale = chosen_plan(args.example, args.quick)
    study, tasks = Study(folder), make(folder, scale)
    chosen = choose(tasks, args.only)
    if args.list:
        done = study.done(chosen, fingerprint(SUBJECTS[args.example]))
        for task in chosen:
            print("done " if task.id in done else "     ", task.id, *task.arguments)
        return
    os.chdir(ROOT)  # router paths in commands are relative to it
    with study.writing():
        try:
            failed = perform_all(study, chosen, tasks, args.processes)
            measure_latencies(study, tasks, scale.repeats)
        finally:  # what is done can be looked at, whatever ended the rest
            write_results(study, tasks)
    print(f"wrote {folder}/study.json and table.md, and {page_folder(folder)}/report.html")
    if failed:
        raise ValueError(f"not done: {', '.join(failed)}; see {folder}/scratch/*.log and run again")


if __name__ == "__main__":
    cli.run(main, parse_args())
