"""The demo from another folder, with a short training and few samples; and again at once."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import error_line, run
from PIL import Image

import demo


@pytest.fixture
def short(monkeypatch):
    """A chain of three steps, and a training in this process instead of two under torchrun."""
    monkeypatch.setattr("demo.BATCH_SIZE", 2)
    monkeypatch.setattr("demo.REPEATS", 1)
    monkeypatch.setattr("demo.NUM_STEPS", 3)
    monkeypatch.setattr("demo.TRAINING", demo.TRAINING | {"--num-sampling-steps": 3})
    commands, start = [], subprocess.run

    def train_here(command: list[str], **options):
        if "train_router.py" not in command:
            return start(command, **options)
        commands.append(command)
        words = command[command.index("train_router.py") :]
        run(*words)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", train_here)
    return commands


@pytest.mark.slow
def test_demo_leaves_table_and_pictures_and_runs_again(tmp_path, monkeypatch, short):
    monkeypatch.chdir(tmp_path)
    arguments = ["--results-dir", "out", "--train-steps", 4, "--samples", 70]
    for _ in range(2):
        output = run("demo.py", *arguments)
        assert "speed-up of harmonica" in output
    assert sys.executable in short[0]
    assert "--nproc_per_node=2" in short[0]
    table = json.loads((tmp_path / "out" / "demo.json").read_text())
    uncached, cached, fewer = table["rows"]
    assert uncached["mse"] == 0
    assert uncached["fd_uncached"] == pytest.approx(0, abs=1e-6)
    assert fewer["mse"] > 0
    assert 0 <= cached["cur"] < 1
    assert cached["macs_per_image"] <= uncached["macs_per_image"]
    for name in ("comparison", "schedule"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.width > 300
    assert len(list((tmp_path / "out").glob("0*"))) == 1  # the second run trained nothing anew


def test_first_line_says_what_happens_and_for_how_long(tmp_path, monkeypatch):
    """Before the training, whatever becomes of it."""

    def fails(_):
        raise ValueError("no training here")

    monkeypatch.setattr("demo.train", fails)
    first, *_ = run("demo.py", "--results-dir", tmp_path, "--samples", 3000, status=2).splitlines()
    for text in ("trains", "600 train steps", "3,000 digits", "minutes", str(tmp_path)):
        assert text in first


@pytest.mark.slow
def test_training_goes_through_torchrun(tmp_path, monkeypatch):
    monkeypatch.setattr("demo.TRAINING", demo.TRAINING | {"--num-sampling-steps": 2})
    monkeypatch.setattr("demo.NUM_STEPS", 2)
    args = argparse.Namespace(results_dir=Path(tmp_path), processes=2, train_steps=2)
    assert demo.train(args).num_steps == 2


def test_training_that_fails_is_one_line(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert "ended with exit status 1" in error_line("demo.py", "--results-dir", tmp_path, "--processes", 1)
