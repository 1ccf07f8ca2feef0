"""The demo from another folder, with a short training and few samples; and again at once."""

import json

import pytest
from commands import error_line, run
from PIL import Image


@pytest.mark.slow
def test_demo_leaves_table_and_pictures_and_runs_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("demo.BATCH_SIZE", 2)
    arguments = ["--results-dir", "out", "--train-steps", 10, "--samples", 70]
    for _ in range(2):
        output = run("demo.py", *arguments)
        assert "speed-up of harmonica" in output
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


def test_training_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("demo.TRAINING", {"--model": "DiT-Q/2"})
    assert "ended with exit status 1" in error_line("demo.py", "--results-dir", tmp_path, "--processes", 1)
