"""The training command on the digits model: processes, resuming, what it writes, how it fails."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoint_damage import damage
from commands import (
    ENVIRONMENT,
    ROOT,
    alive,
    error_line,
    file_size_limit,
    kill,
    run,
    start_torchrun,
    wait_for,
    write_old_settings,
    writing_elsewhere,
)
from PIL import Image
from ranks import run_on_ranks

import objectives
from common.distributed import Processes
from models import DiT
from router import Router, find_router, load_router, save_router
from training.arguments import parse_args

RUN_NAME = "000-DiT-digits-2-T5-seed42"
TRAIN = ["train_router.py", "--model", "DiT-digits/2", "--num-sampling-steps", 5, "--global-batch-size", 4]
TRAIN += ["--lr", 0.05, "--l1", 1e-4, "--lambda-c", 7, "--log-every", 5]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Results of 23 train steps (four trajectories and a half) on one process, a checkpoint every 6."""
    results = tmp_path_factory.mktemp("results")
    run(*TRAIN, "--results-dir", results, "--max-steps", 23, "--ckpt-every", 6)
    return results


def logits(results) -> torch.Tensor:
    return load_router(find_router(next(results.glob("0*")))).logits


def test_what_a_run_leaves(uninterrupted):
    (folder,) = uninterrupted.iterdir()
    assert folder.name == "000-DiT-digits-2-T5-seed42"
    files = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert files == [f"{step:07d}.{suffix}" for step in (6, 12, 18, 23) for suffix in ("png", "safetensors")]
    info = load_router(folder).info
    wanted = {
        "method": "harmonica",
        "model": "DiT-digits/2",
        "image_size": 8,
        "num_steps": 5,
        "num_branches": 24,
    }
    wanted |= {"cfg_scale": 1.5, "threshold": 0.1, "reg_weight": 1e-4, "train_steps": 23, "version": 1}
    assert wanted.items() <= info.items()
    assert 0 <= info["cur"] < 1
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["train_steps"] for row in metrics] == [5, 10, 15, 20]
    assert all(row["loss"] > 0 and len(row["proxy_weights"]) == 5 for row in metrics)
    log = (folder / "log.txt").read_text()
    assert "step      20/23  loss" in log
    assert "min left" in log
    with Image.open(folder / "schedule.png") as picture:
        assert picture.width > 400


@pytest.mark.slow
def test_four_processes_train_the_same_router(tmp_path):
    eight_rows = [8 if word == 4 else word for word in TRAIN]  # four trajectories
    run(*eight_rows, "--results-dir", tmp_path / "one", "--max-steps", 13)
    run_on_ranks(4, *eight_rows, "--results-dir", tmp_path / "four", "--max-steps", 13)
    assert (logits(tmp_path / "four") - logits(tmp_path / "one")).abs().max() < 1e-5


@pytest.mark.parametrize("stop", [10])
def test_resumed_run_ends_bit_for_bit_the_same(uninterrupted, tmp_path, stop):
    """Stopped by --max-steps, within a trajectory or between two, then asked to go further."""
    arguments = ["--results-dir", tmp_path, "--ckpt-every", 6, "--resume", "auto"]
    run(*TRAIN, *arguments, "--max-steps", stop)
    run(*TRAIN, *arguments, "--max-steps", 23)
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(logits(tmp_path), logits(uninterrupted))
    (folder,) = tmp_path.iterdir()
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train_steps"] for line in metrics] == [5, 10, 15, 20]


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(uninterrupted, tmp_path):
    arguments = [
        *TRAIN,
        "--results-dir",
        tmp_path,
        "--ckpt-every",
        6,
        "--max-steps",
        23,
    ]
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/checkpoints/0000006.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = tmp_path.iterdir()
    assert not (folder / "checkpoints" / "0000023.safetensors").exists()
    run(*arguments, "--resume", folder)
    assert torch.equal(logits(tmp_path), logits(uninterrupted))


@pytest.mark.slow
def test_resumed_run_on_two_processes_ends_bit_for_bit_the_same(tmp_path):
    whole, parts = (
        ["--results-dir", tmp_path / "whole"],
        ["--results-dir", tmp_path / "parts", "--resume", "auto"],
    )
    run_on_ranks(2, *TRAIN, *whole, "--max-steps", 18)
    for stop in (8, 18):
        run_on_ranks(2, *TRAIN, *parts, "--max-steps", stop)
    assert torch.equal(logits(tmp_path / "parts"), logits(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.exhaustive
def test_killed_at_random_moments_on_two_processes_it_ends_bit_for_bit_the_same(tmp_path):
    """kill -9 of torchrun, at once resumed each time: at start-up, between checkpoints, as one is written."""
    steps, moments = 40, random.Random(7)
    settings = [*TRAIN, "--max-steps", steps, "--ckpt-every", 2, "--device", "cpu"]
    run_on_ranks(2, *settings, "--results-dir", tmp_path / "whole")
    for number in range(2):
        process = start_torchrun(2, *settings, "--results-dir", tmp_path / "parts", "--resume", "auto")
        wait_for(lambda: len(alive(process)) >= 3, process)  # noqa: B023
        if number:
            before = newest_step(tmp_path / "parts")
            wait_for(lambda: newest_step(tmp_path / "parts") > before, process)  # noqa: B023
        time.sleep(moments.uniform(0, 0.5))
        assert process.poll() is None, "the run ended before it could be killed"
        assert kill(process) == []
    run_on_ranks(2, *settings, "--results-dir", tmp_path / "parts", "--resume", "auto")
    assert torch.equal(logits(tmp_path / "parts"), logits(tmp_path / "whole"))
    assert not list(tmp_path.rglob("*.part*"))
    assert not list(tmp_path.rglob(".lock"))


def newest_step(results) -> int:
    names = [path.stem for path in results.glob("*/checkpoints/*.safetensors")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    arguments = ["--results-dir", tmp_path, "--max-steps", 10, "--resume", "auto"]
    run(*TRAIN, *arguments)
    file = find_router(next(tmp_path.iterdir()))
    before = file.read_bytes()
    run(*TRAIN, *arguments)
    assert file.read_bytes() == before
    assert len(list(tmp_path.glob("*/checkpoints/*.safetensors"))) == 1


def test_resuming_with_other_settings_is_refused(uninterrupted):
    arguments = [
        *TRAIN,
        "--results-dir",
        uninterrupted,
        "--resume",
        next(uninterrupted.iterdir()),
    ]
    assert "--lr 0.05, not 0.2" in error_line(*arguments, "--lr", 0.2)


def test_resume_auto_starts_anew_where_no_run_is_like_this(tmp_path):
    for seed in (1, 2):
        arguments = ["--results-dir", tmp_path, "--max-steps", 2, "--resume", "auto"]
        run(*TRAIN, *arguments, "--global-seed", seed)
    assert sorted(path.name[:3] for path in tmp_path.iterdir()) == ["000", "001"]


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    uninterrupted, tmp_path, monkeypatch
):
    """From train step 8 on; what was written before it is whole, and the run goes on from there."""
    arguments = [*TRAIN, "--results-dir", tmp_path, "--max-steps", 23, "--ckpt-every", 6]
    losses, calls = objectives._losses, []

    def broken(*given):
        calls.append(1)
        loss, *others = losses(*given)
        return (loss * torch.nan if len(calls) > 6 else loss), *others  # train steps 1 and 6 have none

    with monkeypatch.context() as patch:
        patch.setattr("objectives._losses", broken)
        assert "loss is nan at train step 9 (denoising step 1)" in error_line(*arguments)
    assert len(calls) > 6
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in (folder / "checkpoints").glob("*.safetensors")] == ["0000006.safetensors"]
    run(*arguments, "--resume", "auto")
    assert torch.equal(logits(tmp_path), logits(uninterrupted))


def test_infinite_loss_names_the_rows_of_all_groups(tmp_path):
    arguments = ["--method", "l2c", "--data", "digits", "--l1", 3e38, "--results-dir", tmp_path]
    line = error_line(*TRAIN[:-4], *arguments, "--max-steps", 3)
    assert re.search(r"loss is (inf|nan) at train step 1 \(denoising steps \((\d, ){3}\d\)\)", line)


@pytest.mark.slow
def test_wandb_that_cannot_be_reached_logs_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("training.logs.WANDB_TIMEOUT_S", 1)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    output = run(*TRAIN, "--results-dir", tmp_path, "--max-steps", 5, "--wandb")
    assert "warning: --wandb" in output
    assert "logging offline" in output
    assert list(tmp_path.glob("*/wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    "arguments", [["--global-seed", 43], ["--proxy", "paper"], ["--lambda-c", 100], ["--cfg-scale", 1]]
)
def test_what_should_change_the_router_does(uninterrupted, tmp_path, arguments):
    """Noise and labels, lambda, its refreshes, guidance: far beyond the 1e-5 allowed to processes."""
    run(*TRAIN, "--results-dir", tmp_path, "--max-steps", 23, *arguments)
    assert (logits(tmp_path) - logits(uninterrupted))[:-1].abs().max() > 1e-3


def test_resume_auto_steps_over_what_cannot_be_resumed(uninterrupted, tmp_path):
    """A file half-written, a router without training state, a damaged file: each in a newer folder."""
    shutil.copytree(next(uninterrupted.iterdir()), tmp_path / "000-DiT-digits-2-T5-seed42")
    for number, name in enumerate(
        ("0000006.77.part.safetensors", "router.safetensors", "damaged.safetensors"), 1
    ):
        folder = tmp_path / f"00{number}-DiT-digits-2-T5-seed42" / "checkpoints"
        folder.mkdir(parents=True)
        save_router(folder / name, Router(5, 24)) if number < 3 else (folder / name).write_bytes(b"x")
    output = run(*TRAIN, "--results-dir", tmp_path, "--max-steps", 23, "--resume", "auto")
    assert "resuming from" in output
    assert "000-DiT-digits-2-T5-seed42" in output
    assert len(list(tmp_path.iterdir())) == 4


@pytest.fixture
def copied(uninterrupted, tmp_path):
    """A copy of the run, its folder."""
    return Path(shutil.copytree(next(uninterrupted.iterdir()), tmp_path / "r" / RUN_NAME))


@pytest.mark.parametrize(("kind", "resume"), [("cut", "auto"), ("zero-filled at its end", "folder")])
def test_checkpoint_that_does_not_read_is_skipped_by_name(uninterrupted, copied, kind, resume):
    """The one before it is taken, and the run ends in the same bits."""
    newest = copied / "checkpoints" / "0000023.safetensors"
    damage(newest, kind)
    arguments = ["--results-dir", copied.parent, "--max-steps", 23, "--ckpt-every", 6]
    output = run(*TRAIN, *arguments, "--resume", "auto" if resume == "auto" else copied)
    assert len(re.findall(f"skipped {newest}: ", output)) == 1
    assert "resuming from" in output
    assert "0000018.safetensors" in output
    assert f"skipped {newest}" in (copied / "log.txt").read_text()
    assert len(list(copied.parent.iterdir())) == 1
    assert torch.equal(logits(copied.parent), logits(uninterrupted))


def test_older_runs_are_taken_where_no_checkpoint_of_the_newest_reads(copied):
    newer = Path(shutil.copytree(copied, copied.parent / RUN_NAME.replace("000", "003")))
    for path in (newer / "checkpoints").glob("*.safetensors"):
        damage(path, "cut")
    arguments = [*TRAIN, "--results-dir", copied.parent, "--max-steps", 23, "--resume"]
    assert "no checkpoint of it reads; skipped" in error_line(*arguments, newer)
    output = run(*arguments, "auto")
    assert output.count("skipped") == 4
    assert f"resuming from {copied}" in output
    for path in (copied / "checkpoints").glob("*.safetensors"):
        damage(path, "empty")
    output = run(*TRAIN, "--results-dir", copied.parent, "--max-steps", 2, "--resume", "auto")
    assert output.count("skipped") == 8
    assert f"writing to {copied.parent}/004-" in output


def test_damaged_file_that_is_named_is_refused(copied):
    file = copied / "checkpoints" / "0000018.safetensors"
    damage(file, "cut")
    line = error_line(*TRAIN, "--results-dir", copied.parent, "--resume", file)
    assert f"--resume {file}: no checkpoint of train_router.py" in line
    assert "give its run's folder for the newest that reads" in line


def test_resume_auto_looks_into_no_folder_of_others(copied):
    """A copy of the run under another name is not gone on with."""
    copied.rename(copied.with_name("000-backup"))
    output = run(*TRAIN, "--results-dir", copied.parent, "--max-steps", 2, "--resume", "auto")
    assert f"writing to {copied.parent}/001-DiT" in output


@pytest.mark.parametrize("limit", [2000, 4000])
def test_full_disk_is_one_line_and_the_last_checkpoint_is_whole(uninterrupted, copied, limit):
    """Too little for a checkpoint (of 3.5 kB), or for the pictures alone."""
    arguments = [*TRAIN, "--results-dir", copied.parent, "--ckpt-every", 6, "--resume", "auto"]
    for name in ("0000018", "0000023"):
        (copied / "checkpoints" / f"{name}.safetensors").unlink()
    for name in ("log.txt", "metrics.jsonl"):
        (copied / name).unlink()
    with file_size_limit(limit):
        line = error_line(*arguments, "--max-steps", 23)
    written = "0000012.safetensors" if limit == 2000 else "schedule.png"  # it repeats the round of step 12
    assert f"{written} cannot be written (" in line
    assert f"the last checkpoint, {copied}/checkpoints/0000012.safetensors, is whole" in line
    assert "--resume auto goes on" in line
    assert not list(copied.rglob("*.part*"))
    assert not list(copied.rglob(".lock"))
    run(*arguments, "--max-steps", 23)
    assert torch.equal(logits(copied.parent), logits(uninterrupted))


def test_full_disk_at_the_log(tmp_path):
    with file_size_limit(20):
        line = error_line(*TRAIN, "--results-dir", tmp_path, "--max-steps", 5)
    assert "log.txt cannot be written (File too large)" in line


def test_what_a_killed_writer_left_is_cleared_by_the_next(copied):
    half = copied / "checkpoints" / "0000023.4711.part.safetensors"
    half.write_bytes(b"half a checkpoint")
    (copied / "schedule.4711.part.png").write_bytes(b"half a picture")
    with open(copied / "metrics.jsonl", "ab") as file:
        file.write(b'{"train_steps": 25, "lo' + bytes(20))
    run(*TRAIN, "--results-dir", copied.parent, "--max-steps", 25, "--resume", copied)
    assert not list(copied.rglob("*.part*"))
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train_steps"] for line in lines] == [5, 10, 15, 20, 25]


def test_one_process_trains_in_a_folder(copied, monkeypatch):
    monkeypatch.setattr("common.files.PATIENCE_S", 0.1)
    arguments = [*TRAIN, "--results-dir", copied.parent, "--max-steps", 30, "--resume"]
    before = sorted(copied.rglob("*"))
    with writing_elsewhere(copied) as pid:
        for resume in ("auto", copied, copied / "checkpoints" / "0000012.safetensors"):
            line = error_line(*arguments, resume)
            assert f"{copied} is being written by process {pid} on" in line
    assert sorted(path for path in copied.rglob("*") if path.name != ".lock") == before
    run(*arguments, "auto")  # killed a moment ago


@pytest.mark.parametrize(
    ("package", "arguments", "words"),
    [
        ("wandb", ["--wandb"], "--wandb needs wandb"),
        ("matplotlib", [], "the picture of a schedule needs matplotlib"),
        ("sklearn.datasets", ["--method", "l2c", "--data", "digits"], "import of sklearn.datasets halted"),
    ],
)
def test_package_that_is_not_installed_is_one_line_before_the_folder(
    tmp_path, monkeypatch, package, arguments, words
):
    monkeypatch.setitem(sys.modules, package, None)
    line = error_line(*TRAIN, "--results-dir", tmp_path / "r", *arguments)
    assert words in line
    assert "pip install" in line
    assert not (tmp_path / "r").exists()


def test_something_in_the_way_of_the_results_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name, reason in (("file", "is a file"), ("file/r", "is a file"), ("link", "is a link to nothing")):
        line = error_line(*TRAIN, "--results-dir", tmp_path / name)
        assert f"folder {tmp_path / name} cannot be made" in line
        assert reason in line


def test_checkpoint_outside_its_run_is_not_resumed(uninterrupted, tmp_path):
    file = shutil.copy(find_router(next(uninterrupted.iterdir())), tmp_path)
    line = error_line(*TRAIN, "--results-dir", tmp_path / "r", "--resume", file)
    assert "not a checkpoint in its run's folder" in line


def test_log_of_every_step_is_valid_json(tmp_path):
    """The first denoising step of a trajectory trains nothing and has no loss."""
    run(*TRAIN, "--results-dir", tmp_path, "--max-steps", 6, "--log-every", 1)
    lines = next(tmp_path.glob("*/metrics.jsonl")).read_text().splitlines()
    assert [("loss" in json.loads(line)) for line in lines] == [False, True, True, True, True, False]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "DiT-Q/2", "--random-weights"], "--model DiT-Q/2 is unknown"),
        (["--ckpt", "absent.pt"], "absent.pt does not exist"),
        (["--model", "DiT-S/8", "--image-size", "256"], "no official checkpoint of DiT-S/8"),
        (["--num-sampling-steps", "0", "--random-weights"], "respacing '0'"),
        (["--num-sampling-steps", "1", "--random-weights"], "at least 2 steps"),
        (["--precision", "int8"], "invalid choice: 'int8'"),
        (["--max-steps", "0"], "0 is not at least 1"),
        (["--resume", "nowhere", "--random-weights"], "nowhere does not exist"),
        (["--ste-threshold", "1.5"], "1.5 is outside [0, 1)"),
        (["--global-seed", "-1"], "-1 is negative"),
        (["--device", "cuda:7", "--random-weights"], "--device cuda:7 cannot be used"),
    ],
)
def test_wrong_use_ends_in_one_line(tmp_path, arguments, words):
    if "cuda:7" in arguments and torch.cuda.device_count() > 7:
        pytest.skip("this machine has eight GPUs")
    assert words in error_line(
        "train_router.py", "--model", "DiT-digits/2", "--results-dir", tmp_path / "r", *arguments
    )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("flags", "words"), [
    ([], "--global-batch-size 4 cannot be shared by 3 ranks: it is 2 trajectories, take a multiple of 6"),
    (["--cfg-scale", 1], "--global-batch-size 4 cannot be shared by 3 ranks, take a multiple of 3"),
    (["--trajectories", 4], "--trajectories 4 cannot be shared by 3 ranks, take a multiple of 3"),
])  # fmt: skip
def test_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr("common.distributed.start", lambda _: Processes(0, 3, torch.device("cpu")))
    train = [*TRAIN[:5], *TRAIN[7:]] if "--trajectories" in flags else TRAIN
    assert words in error_line(*train, *flags, "--results-dir", tmp_path / "r")
    assert not (tmp_path / "r").exists()


END_TO_END = ["--method", "end-to-end", "--target-speedup", 1.5, "--max-steps", 17]
L2C = ["--method", "l2c", "--data", "digits", "--max-steps", 1]


@pytest.mark.parametrize(("method", "batch", "rows", "settings"), [
    ([], ["--global-batch-size", 4], 4, {"trajectories": 2}),
    ([], ["--trajectories", 4], 8, {"trajectories": 4}),
    (["--cfg-scale", 1], ["--global-batch-size", 4], 4, {"trajectories": 4}),
    (["--cfg-scale", 1], ["--trajectories", 3], 3, {"trajectories": 3}),
    (L2C, ["--global-batch-size", 4, "--groups", 1], 4, {"global_batch_size": 4, "groups": 1}),
    (L2C, ["--global-batch-size", 4, "--groups", 2], 2, {"global_batch_size": 4, "groups": 2}),
])  # fmt: skip
def test_a_batch_is_counted_in_rows_of_a_forward_pass(tmp_path, monkeypatch, method, batch, rows, settings):
    """As the released HarmoniCa counts it: under guidance conditional and unconditional rows together."""
    predict, met = DiT.predict, Counter()

    def counted(model, x, *others):
        met[len(x)] += 1
        return predict(model, x, *others)

    monkeypatch.setattr(DiT, "predict", counted)
    train = ["train_router.py", "--model", "DiT-digits/2", "--num-sampling-steps", 3, "--max-steps", 3]
    run(*train, *method, *batch, "--results-dir", tmp_path)
    assert set(met) == {rows}
    written = load_router(next(tmp_path.iterdir())).info["settings"]
    assert settings.items() <= written.items()
    assert len({"trajectories", "global_batch_size"} & set(written)) == 1  # what decides the numbers


def test_published_batch_is_32_trajectories():
    args = parse_args(["--global-batch-size", "64", "--cfg-scale", "1.5"])
    assert (args.trajectories, args.global_batch_size) == (32, 64)
    assert parse_args([]).trajectories == 32
    assert parse_args(["--trajectories", "64"]).global_batch_size == 128
    assert parse_args(["--cfg-scale", "1"]).trajectories == 64


@pytest.mark.parametrize(("flags", "words"), [
    (["--global-batch-size", 7], "--global-batch-size 7 is odd: under guidance a trajectory is two rows"),
    (["--global-batch-size", 64, "--trajectories", 32], "not allowed with"),
    (["--trajectories", 0], "0 is not at least 1"),
    ([*END_TO_END, "--global-batch-size", 8, "--pool", 3], "--pool 3 is less than a batch (4)"),
])  # fmt: skip
def test_what_no_batch_can_be_is_refused(tmp_path, flags, words):
    train = ["train_router.py", "--model", "DiT-digits/2", "--results-dir", tmp_path]
    assert words in error_line(*train, *flags)
    assert not list(tmp_path.iterdir())


def test_a_run_that_counted_trajectories_goes_on_with_as_many(tmp_path):
    """A checkpoint from before batches were counted in rows: the same command now means half as many."""
    arguments = [*TRAIN[:5], *TRAIN[7:], "--results-dir", tmp_path, "--resume", "auto"]
    run(*arguments, "--trajectories", 4, "--max-steps", 7)
    file = find_router(next(tmp_path.iterdir()))
    write_old_settings(file)
    text = run(*arguments, "--global-batch-size", 4, "--max-steps", 1)
    said = "was trained with --trajectories 4, not 2; when it began, --global-batch-size counted trajectories"
    assert said in text
    assert "a new run begins" in text
    assert said in error_line(*arguments[:-1], file, "--global-batch-size", 4)
    shutil.rmtree(max(tmp_path.iterdir()))
    for number, again in enumerate((["--trajectories", 4], ["--global-batch-size", 8]), 8):
        assert "resuming from" in run(*arguments, *again, "--max-steps", number)


def test_flags_that_do_not_matter_do_not_keep_a_run_from_going_on(tmp_path):
    """Nobody reads --lambda-c without a proxy, so another one is no other training."""
    arguments = [*TRAIN, "--results-dir", tmp_path, "--resume", "auto", "--proxy", "none"]
    run(*arguments, "--max-steps", 3)
    text = run(*arguments, "--max-steps", 6, "--lambda-c", 9)
    assert "resuming from" in text
    assert "warning: --lambda-c has no effect with --proxy none" in text


@pytest.mark.parametrize("spelling", ["--local-rank=1", "--local_rank=1"])
def test_launchers_that_pass_the_local_rank_are_understood(tmp_path, monkeypatch, spelling):
    """torch.distributed.launch and DeepSpeed's; where the environment says it, that counts."""
    arguments, seen = [*TRAIN, "--results-dir", tmp_path, "--max-steps", 1, spelling], []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("train_router.main", lambda _: seen.append(os.environ["LOCAL_RANK"]))
    for given in ({}, {"LOCAL_RANK": "0"}):
        with mock.patch.dict(os.environ, given):
            run(*arguments)
    assert seen == ["1", "0"]
