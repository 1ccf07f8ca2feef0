"""The command: a very small study, going on with it, and measuring a row of it again."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from commands import ROOT, error_line, run

from router import Router
from study import plan
from study.plan import EndToEndScale, Scale, Speed, Task
from study.run import choose, collect, drawn_trainings, keep
from study.store import Records, Study
from study.subjects import DIGITS, fingerprint
from study.tables import FORECAST, MAIN_SPEED

STEPS = 4
SPEED = Speed(float(MAIN_SPEED), "2", "2", 2)
SMALL = Scale(
    samples=12,
    samples_in_readme=12,
    seeds={STEPS: 1},
    speeds={STEPS: [SPEED]},
    updates={STEPS: 2},
    lr=0.5,
    repeats=1,
    ablations=False,
    end_to_end={STEPS: EndToEndScale(18, 1)},
)


def small_plan(folder: Path, _: Scale = SMALL) -> list[Task]:
    """A row of each kind: untrained, step by step, another's router, Learning-to-Cache, end to end."""
    router = plan.step_by_step(SMALL, "harmonica", STEPS, 0, SPEED.target)
    l2c = plan.step_by_step(SMALL, "l2c-every-row", STEPS, 0, SPEED.target)
    group = {"group": "threshold", "variant": 0.5, "settings": {"thres": 0.5}}
    rows = [
        next(plan.untrained(STEPS, SPEED)),
        plan.routed(router, "harmonica", STEPS, SPEED, 0),
        plan.routed(router, "taylor-harmonica", STEPS, SPEED, 0, "taylor-"),
        plan.routed(l2c, "l2c-every-row", STEPS, SPEED, 0),
        plan.routed(plan.end_to_end(SMALL, STEPS, SPEED), FORECAST, STEPS, SPEED, 0),
        plan.routed(router, "harmonica", STEPS, None, 0, **group),
    ]
    return plan.tasks(rows, folder, SMALL)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A small study that the command made, and what it printed the first time and the second."""
    folder = tmp_path_factory.mktemp("a study")
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.chdir(ROOT)  # where the study goes
        patch.setattr("study.run.plan", small_plan)
        patch.setattr("study.run.QUICK", SMALL)
        patch.setattr("study.measure.LATENCY_BATCH", 2)
        arguments = ["--quick", "--results-dir", folder, "--processes", 1]
        output = [run("study.run", *arguments)]
        patch.setattr("study.run.write_page", lambda *_: None)  # once is enough
        output.append(run("study.run", *arguments))
    return SimpleNamespace(folder=folder, tasks=small_plan(folder), output=output)


FIGURES = {
    "method", "num_steps", "cur", "speedup_macs", "digits_fid", "fd_uncached", "accuracy", "mse", "psnr",
    "cfg_scale", "router", "command", "train_command", "speedup_latency", "latency_ms",
}  # fmt: skip


@pytest.mark.slow
def test_study_measures_every_row_of_its_plan(study):
    rows = json.loads((study.folder / "study.json").read_text())["rows"]
    assert [row["id"] for row in rows] == [task.id for task in study.tasks if task.row]
    methods = {"uncached", "fora", "harmonica", "taylor-harmonica", "l2c-every-row", FORECAST}
    assert {row["method"] for row in rows} == methods
    assert Study(study.folder).routers.keys() == {task.id for task in study.tasks if task.is_training}
    for row in rows:
        assert row.keys() >= FIGURES
        assert (row["mse"] == 0) == (row["method"] == "uncached")
        assert (row["train_command"] is not None) == (row["router"] is not None)
        assert (row["latency_ms"] is None) == (row.get("group") is not None), row["id"]
    assert "Learned schedules" in (study.folder / "report.html").read_text()
    assert "| harmonica |" in (study.folder / "table.md").read_text()


@pytest.mark.slow
def test_study_goes_on_where_it_was(study):
    first, second = study.output
    count = len(study.tasks)
    assert first.startswith(f"0 of {count} tasks are done")
    assert second.startswith(f"{count} of {count} tasks are done")
    assert "latency of" in first
    assert "latency of" not in second
    assert not (study.folder / ".lock").exists()


@pytest.mark.slow
def test_row_is_measured_again_by_its_command(study, monkeypatch):
    rows = json.loads((study.folder / "study.json").read_text())["rows"]
    row = next(row for row in rows if row["method"] == FORECAST)
    task = next(task for task in study.tasks if task.id == row["id"])
    assert row["command"] == task.command
    assert task.command.startswith("python -m study.measure --num-sampling-steps 4 ")
    monkeypatch.setattr("study.measure.LATENCY_BATCH", 2)
    monkeypatch.chdir(ROOT)  # the router's path is relative to it
    again = json.loads(re.findall(r"^{.*}$", run("study.measure", *task.arguments), re.MULTILINE)[-1])
    for figure in ("cur", "speedup_macs", "digits_fid", "fd_uncached", "mse", "psnr", "ssim", "accuracy"):
        assert again[figure] == pytest.approx(row[figure], rel=1e-3), figure


@pytest.mark.slow
def test_curves_are_kept_of_trainings_that_the_report_draws(study):
    found = Records(study.folder / "curves.jsonl").read()
    trainings = {task.id for task in study.tasks if task.is_training}
    assert set(found) <= drawn_trainings(study.tasks) == trainings
    assert any("end-to-end" in id for id in found)


# ---- without training or measuring -----------------------------------------------------------------


def record(task: Task, **changes) -> dict:
    """A row as a worker would hand it over."""
    figures = dict.fromkeys(
        ("digits_fid", "digits_fid_uncached", "fd_uncached", "accuracy", "mse", "cur"), 0.5
    )
    figures |= {"num_steps": task.row.num_steps, "speedup_macs": 1.96, "sampler": "ddim", "cfg_scale": 1.0}
    figures |= {"samples": 12, "seed": 1, "batch_size": 250, "dtype": "float32", "hardware": "a machine"}
    identity = {"id": task.id, "command": task.command, "router_hash": None, "weights": fingerprint(DIGITS)}
    return task.row.facts | figures | identity | changes


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """A study of two rows, uncached and FORA, that is not begun; latencies are left out."""
    tasks = plan.tasks([next(plan.untrained(STEPS, SPEED))], tmp_path, SMALL)
    monkeypatch.setattr("study.run.plan", lambda *_: tasks)
    monkeypatch.setattr("study.run.measure_latencies", lambda *_: None)
    return Study(tmp_path), tasks


def test_what_was_done_before_ctrl_c_is_kept(untrained, monkeypatch):
    study, (uncached, fora) = untrained

    def interrupted(study, *_):
        keep(study, uncached, record(uncached), with_curve=False)
        raise KeyboardInterrupt

    monkeypatch.setattr("study.run.perform_all", interrupted)
    run("study.run", "--results-dir", study.folder, status=130)
    rows = json.loads((study.folder / "study.json").read_text())["rows"]
    assert [row["id"] for row in rows] == [uncached.id]
    assert "done  " + uncached.id in run("study.run", "--results-dir", study.folder, "--list")
    assert "done  " + fora.id not in run("study.run", "--results-dir", study.folder, "--list")


def test_two_commands_do_not_write_in_one_study(untrained):
    study, _ = untrained
    with study.writing():
        assert "is being written by" in error_line("study.run", "--results-dir", study.folder)
        run("study.run", "--results-dir", study.folder, "--list")  # looking is allowed
    assert not study.rows.path.exists()


def test_failed_task_is_named_and_the_rest_is_done(untrained, monkeypatch):
    study, (uncached, fora) = untrained

    class Here:
        """An executor that does everything at once, in this process; FORA fails."""

        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, _, folder, task):  # noqa: ARG002
            from concurrent.futures import Future

            future = Future()
            if task is fora:
                future.set_exception(ValueError("no such interval"))
            else:
                future.set_result(record(task))
            return future

    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", Here)
    text = run("study.run", "--results-dir", study.folder, "--processes", 1, status=2)
    assert f"[1/2] {fora.id}: FAILED: ValueError: no such interval" in text
    assert f"error: not done: {fora.id}; see" in text
    assert study.rows.read().keys() == {uncached.id}


def test_results_are_of_this_router_and_these_settings(untrained):
    """A latency that was measured before a training anew does not count; a row of other settings neither."""
    study, _ = untrained
    router = plan.step_by_step(SMALL, "harmonica", STEPS, 0, SPEED.target)
    training, uncached, task = plan.tasks(
        [plan.routed(router, "harmonica", STEPS, SPEED, 0)], study.folder, SMALL
    )
    trained = Router.from_logits(torch.full((STEPS, 24), -5.0))
    trained.info = {"settings": {"weights": fingerprint(DIGITS)}, "cur": 0.5, "speedup_macs": 1.96}
    study.add_router(training, trained)
    own = study.router_hash(task)
    study.rows.add(record(task, router_hash=own))
    latency = {"id": task.id, "latency_ms": 3.0, "speedup_latency": 2.0}
    for router_hash, shown in ((own, 3.0), ("another", None)):
        study.latencies.add(latency | {"router_hash": router_hash})
        [row] = collect(study, [training, uncached, task])
        assert row["latency_ms"] == shown
        assert row["train_command"] == training.command
    study.rows.add(record(task, router_hash=own, command="python -m study.measure --cfg-scale 2"))
    assert not collect(study, [training, uncached, task])


def test_only_takes_what_is_needed_along():
    tasks = small_plan(Path("x"))
    chosen = choose(tasks, "harmonica-T4-1.96-0")
    assert [task.id for task in chosen] == [
        "uncached-T4", "harmonica-T4-speedup1.96-s0", "harmonica-T4-1.96-0", "taylor-harmonica-T4-1.96-0",
    ]  # fmt: skip
    assert choose(tasks, None) is tasks


def test_needs_of_needs_are_taken_along():
    row = next(task for task in plan.plan(plan.EVIDENCE, plan.FULL) if "from-50-steps-T10-1.96" in task.id)
    chosen = {task.id for task in choose(plan.plan(plan.EVIDENCE, plan.FULL), row.id)}
    assert {f"{FORECAST}-from-50-steps-T10-speedup1.96-s0", f"{FORECAST}-T50-speedup1.96-s0"} < chosen


def test_nothing_chosen_is_one_line(tmp_path):
    line = error_line("study.run", "--only", "magic", "--results-dir", tmp_path / "new")
    assert "--only 'magic': no task's id contains it" in line
    assert not list(tmp_path.iterdir())
