"""benchmarks.peers on the real widths with one block and four tokens or so."""

import dataclasses
import importlib.util
import json

import pytest
from commands import error_line, run

from backbones.pixart_models import PIXART
from benchmarks import peers

SCHEDULES = ["all", "random:0.375", "random:0.5", "fora:2"]


def found(model: str, monkeypatch, tmp_path) -> dict[str, dict]:
    """The rows by method; all that a reader needs beside them is in the file."""
    monkeypatch.setitem(peers.DIT, "DiT-XL-2-256", 32)
    monkeypatch.setitem(
        PIXART, "PixArt-Sigma-256", dataclasses.replace(PIXART["PixArt-Sigma-256"], pixels=32)
    )
    output = tmp_path / "x.json"
    arguments = ["--blocks", 1, "--num-sampling-steps", 4, "--repeats", 1, "--device", "cpu"]
    text = run("benchmarks.peers", "--model", model, *arguments, "--output", output)
    result = json.loads(output.read_text())
    assert result == json.loads(text[text.index("\n{") :].splitlines()[1])
    assert (result["dtype"], result["seed"], result["batch_size"]) == ("float32", 0, 1)
    assert {"torch", "diffusers"} <= result["versions"].keys()
    assert "threads" in result["hardware"]
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["speedup_latency"] / row["speedup_macs"])
    return {row["method"]: row for row in result["rows"]}


def test_our_dit_beside_that_of_diffusers(monkeypatch, tmp_path):
    rows = found("DiT-XL-2-256", monkeypatch, tmp_path)
    ours = ["ours", *(f"ours {name}" for name in SCHEDULES[1:])]
    assert list(rows) == ["diffusers", *SCHEDULES, *ours]
    assert rows["diffusers"]["difference"] == 0
    for name in ours:  # the same numbers from two roads
        assert 0 < rows[name]["difference"] < 1e-5, name
        assert rows[name]["share"] == rows[name.removeprefix("ours ").replace("ours", "all")]["share"]


def test_steps_that_diffusers_spaces_differently_are_refused():
    found = error_line("benchmarks.peers", "--model", "DiT-XL-2-256", "--num-sampling-steps", 30)
    assert "--num-sampling-steps 30 does not divide 1000" in found


@pytest.mark.slow  # cache-dit's import
def test_hooks_beside_cache_dit(monkeypatch, tmp_path):
    rows = found("PixArt-Sigma-256", monkeypatch, tmp_path)
    has_cache_dit = importlib.util.find_spec("cache_dit") is not None
    others = ["cache-dit", "as cache-dit"] if has_cache_dit else []
    assert list(rows) == ["diffusers", *SCHEDULES, *others]
    assert rows["diffusers"]["difference"] == 0
    assert rows["fora:2"]["share"] == 0.5
