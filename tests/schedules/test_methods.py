"""`--accelerate-method`: each value from its flags to a schedule, and what is refused."""

import re

import pytest
import torch
from commands import error_line, run

from router import Router, save_router
from schedules.baselines import fora_schedule, random_schedule

SAMPLE = ["sample.py", "--model", "DiT-digits/2", "--num-sampling-steps", 4, "--repeats", 0, "--labels", 3]


@pytest.fixture(scope="module")
def routers(tmp_path_factory):
    folder, logits = tmp_path_factory.mktemp("routers"), torch.full((4, 24), 3.0)
    logits[::2] = -3.0
    facts = {"model": "DiT-digits/2", "threshold": 0.1, "cfg_scale": 4.0, "respacing": "4"}
    for method in ("harmonica", "l2c"):
        save_router(folder / f"{method}.safetensors", Router.from_logits(logits), method=method, **facts)
    return folder


def cur_of(text: str) -> float:
    return float(re.search(r"CUR ([\d.]+) %", text)[1])


@pytest.mark.parametrize("prefix", ["", "taylor-", "calibrated-"])
@pytest.mark.parametrize(
    ("method", "flags", "cur"),
    [
        ("fora", ["--interval", "3/2"], fora_schedule(4, 24, "3/2").cur),
        ("random", ["--cur", 0.3, "--schedule-seed", 2], random_schedule(4, 24, 0.3, 2).cur),
        ("dynamiclayer", ["--path", "harmonica.safetensors"], 0.5),
        ("l2c", ["--path", "l2c.safetensors"], 0.5),
        ("dpcache", ["--full-steps", 2, "--plan-samples", 2], 0.5),
        ("budcache", ["--full-steps", 2, "--plan-samples", 2, "--evaluations", 3], 0.5),
    ],
)
def test_each_method_samples(routers, tmp_path, monkeypatch, prefix, method, flags, cur):
    monkeypatch.chdir(routers)
    flags = [*flags, "--calibrate", 4] if prefix == "calibrated-" else flags
    text = run(
        *SAMPLE, "--accelerate-method", prefix + method, *flags, "--output", tmp_path / "x.png", "--compare"
    )
    assert cur_of(text) == pytest.approx(100 * cur, abs=0.01)
    assert ("forecast of order 1" in text) == (prefix == "taylor-")
    assert (", calibrated" in text) == (prefix == "calibrated-")
    assert "cached against uncached: MSE of x_0" in text


@pytest.mark.parametrize(
    ("prefix", "flags", "words"),
    [
        ("hermite-", ["--order", 2, "--sigma", 0.4], "Hermite forecast of order 2, sigma 0.4"),
        ("chebyshev-", ["--ridge", 0.02], "Chebyshev forecast of order 1, ridge 0.02"),
        ("linear-", ["--calibrate", 4], "linear weights"),
        ("modes-", ["--calibrate", 4], "dynamic modes"),
    ],
)
def test_each_kind_of_reuse_samples(tmp_path, prefix, flags, words):
    method = ["--accelerate-method", f"{prefix}fora", "--interval", 2]
    text = run(*SAMPLE, *method, *flags, "--output", tmp_path / "x.png")
    assert words in text
    assert cur_of(text) == pytest.approx(50, abs=0.01)


def test_fewer_steps(tmp_path):
    arguments = [
        "--accelerate-method",
        "fewer-steps",
        "--steps",
        3,
        "--compare",
        "--output",
        tmp_path / "x.png",
    ]
    text = run(*SAMPLE, *arguments)
    assert "DDIM (the default), 3 steps" in text
    assert "fewer-steps against uncached: MSE of x_0" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["magic"],
            "'magic' is unknown; choose one of none, fewer-steps, fora, random, dynamiclayer, l2c",
        ),
        (["fora"], "fora needs --interval, a number"),
        (["taylor-random"], "taylor-random needs --cur, a number"),
        (["l2c"], "l2c needs --path, a router file or a folder that holds one"),
        (["fora", "--interval", "0.5"], "0.5 is below 1; 1 computes every step"),
        (["fora", "--interval", "1/0"], "1/0 is below 1"),
        (["taylor-fora", "--interval", 2, "--order", 3], "invalid choice"),
        (["random", "--cur", "nan"], "nan is no finite number"),
        (["calibrated-none"], "'calibrated-none' is unknown"),
        (["calibrated-fora"], "calibrated-fora needs --interval, a number"),
        (["calibrated-fora", "--interval", 2, "--terms", 4], "invalid choice"),
    ],
)
def test_wrong_flags_are_refused(arguments, message):
    assert message in run(*SAMPLE, "--accelerate-method", *arguments, status=2)


def test_what_does_not_fit_is_one_line(routers, tmp_path):
    method = [*SAMPLE, "--output", tmp_path / "x.png", "--accelerate-method"]
    assert "outside 0 .. 0.75" in error_line(*method, "random", "--cur", 0.9)
    assert "more than --num-sampling-steps 4" in error_line(*method, "fewer-steps", "--steps", 5)
    line = error_line(*method, "l2c", "--path", routers / "harmonica.safetensors")
    assert "was trained by harmonica, not l2c; use --accelerate-method dynamiclayer" in line
    assert not list(tmp_path.iterdir())


def test_flag_of_another_method_is_said(tmp_path):
    arguments = ["--accelerate-method", "fora", "--interval", 2, "--cur", 0.5, "--output", tmp_path / "x.png"]
    assert "--cur has no effect with --accelerate-method fora" in run(*SAMPLE, *arguments)
