"""Which method with which values: by hand, from one word, from flags; and what a new method takes."""

import argparse
from fractions import Fraction

import pytest
import torch
from commands import run

from backbones.loading import load_model
from common import cli
from diffusion import create_diffusion
from router import Schedule
from sampling.settings import SamplingSettings
from schedules import settings as method_settings
from schedules.baselines import fora_schedule
from schedules.forecasts import taylor
from schedules.methods import calibration, load_method, solved, uncached
from schedules.settings import MethodSettings
from schedules.table import METHODS, Flag, MethodRow, flags_of, names, static

SAMPLING = SamplingSettings("6")


@pytest.fixture(scope="module")
def model():
    return load_model("DiT-digits/2", random_weights=True)


def test_flags_that_are_not_given_have_their_defaults():
    fora = MethodSettings("fora", {"interval": 2, "anchor": None})
    assert fora.values == {"interval": 2, "anchor": "first", "first_steps": 1}
    both = MethodSettings("calibrated-random", {"cur": 0.5})
    assert both.base_values() == {"cur": 0.5, "schedule_seed": 0}
    assert both.reuse_values() == {"calibrate": 64, "terms": 3} == calibration(both)
    assert (both.reuse, both.base, both.caches) == ("calibrated", "random", True)
    assert not MethodSettings("fewer-steps", {"steps": 3}).caches
    assert calibration(MethodSettings("taylor-fora", {"interval": 2})) == {}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("magic", {}, "'magic' is unknown; choose one of none, fewer-steps, fora"),
        ("taylor-none", {}, "'taylor-none' is unknown"),
        ("fora", {}, "fora needs --interval, a number"),
        ("l2c", {}, "l2c needs --path, a router file or a folder"),
        ("fora", {"interval": 2, "cur": 0.5, "order": 1}, "fora does not read cur, order"),
    ],
)
def test_what_is_no_method_is_refused(name, values, message):
    with pytest.raises(ValueError, match=message):
        MethodSettings(name, values)


@pytest.mark.parametrize(
    ("spec", "name", "values"),
    [
        ("none", "none", {}),
        ("fora:3/2", "fora", {"interval": Fraction(3, 2)}),
        ("taylor-fora:2", "taylor-fora", {"interval": 2}),
        ("random:0.25", "random", {"cur": 0.25}),
        ("fewer-steps:4", "fewer-steps", {"steps": 4}),
        ("l2c:a:b.pt", "l2c", {"path": "a:b.pt"}),
        ("folder/router.pt", "dynamiclayer", {"path": "folder/router.pt"}),
    ],
)
def test_one_word(spec, name, values):
    assert MethodSettings.from_spec(spec) == MethodSettings(name, values)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fora", "write fora:INTERVAL"),
        ("none:2", "write none"),
        ("fora:0.5", "'fora:0.5': 0.5 is below 1"),
        ("random:nan", "'random:nan': nan is no finite number"),
        ("fewer-steps:x", "'fewer-steps:x': invalid literal"),
    ],
)
def test_one_word_that_is_wrong(spec, message):
    with pytest.raises(ValueError, match=message):
        MethodSettings.from_spec(spec)


def test_flags_of_a_command_give_the_same_settings():
    parser = argparse.ArgumentParser()
    method_settings.add_arguments(parser)
    args = cli.parse(parser, ["--accelerate-method", "taylor-fora", "--interval", "2", "--order", "2"])
    method_settings.check_arguments(parser, args)
    assert MethodSettings.from_arguments(args) == MethodSettings("taylor-fora", {"interval": 2, "order": 2})
    assert not args.notes


@pytest.mark.parametrize(
    ("words", "name", "samples"),
    [
        ("fora --interval 2 --calibrate", "calibrated-fora", 64),
        ("fora --interval 2 --calibrate 64", "calibrated-fora", 64),
        ("dynamiclayer --path R --calibrate 9", "calibrated-dynamiclayer", 9),
        ("calibrated-fora --interval 2 --calibrate 9", "calibrated-fora", 9),
        ("taylor-fora --interval 2 --calibrate 9", "taylor-fora", None),
        ("none --calibrate", "none", None),
    ],
)
def test_the_flag_calibrate_makes_a_method_a_calibrated_one(words, name, samples):
    parser = argparse.ArgumentParser()
    method_settings.add_arguments(parser)
    args = cli.parse(parser, ["--accelerate-method", *words.split()])
    method_settings.check_arguments(parser, args)
    found = MethodSettings.from_arguments(args)
    assert (found.name, found.values.get("calibrate")) == (name, samples)
    assert bool(args.notes) == (samples is None)
    assert "calibrate" not in " ".join(args.notes) or name in args.notes[0]


def test_loading_by_hand(model):
    fora = MethodSettings("fora", {"interval": 2, "anchor": "last"})
    expected = fora_schedule(6, 24, 2, "last")
    method = load_method(fora, model, SAMPLING)
    assert torch.equal(method.schedule.compute, expected.compute)
    assert method.schedule.weights is None
    forecast = load_method(MethodSettings("taylor-fora", {"interval": 2, "order": 2}), model, SAMPLING)
    assert torch.equal(forecast.schedule.weights, taylor(fora_schedule(6, 24, 2), 2).weights)
    assert uncached(model, SAMPLING).schedule is None
    fewer = load_method(MethodSettings("fewer-steps", {"steps": 3}), model, SamplingSettings("ddim5"))
    assert fewer.diffusion.timestep_map == create_diffusion("ddim3").timestep_map
    assert fewer.speedup_macs(model, 5) == pytest.approx(5 / 3)


def test_weights_may_be_solved_later(model):
    settings = MethodSettings("calibrated-fora", {"interval": 2, "calibrate": 2, "terms": 2})
    sampling = SamplingSettings("4")
    method = load_method(settings, model, sampling, solve=False)
    assert method.schedule.weights is None
    whole = load_method(settings, model, sampling)
    later = solved(settings, model, sampling, method)
    assert whole.schedule.weights.shape == (4, 24, 2)
    assert torch.equal(later.schedule.weights, whole.schedule.weights)
    assert torch.equal(method.with_reuse_weights(whole.schedule.weights).schedule.weights,
                       whole.schedule.weights)  # fmt: skip
    assert method.with_reuse_weights(None) is method


def every_layer(num_steps: int, num_branches: int, layers: int, shift: int = 0) -> Schedule:
    """A new schedule: one branch of `layers` computed, another one at each step."""
    table = torch.zeros(num_steps, num_branches, dtype=torch.bool)
    for step in range(num_steps):
        table[step, (step + shift) % layers :: layers] = True
    return Schedule(table, f"every layer of {layers}")


def test_a_new_static_schedule_is_a_function_and_a_row(monkeypatch, tmp_path):
    """With the flags that it reads, one word, forecasts, notes on flags without effect."""
    flags = (
        Flag("layers", "compute one branch of N", cli.positive_int, metavar="N", needed="a number"),
        Flag("shift", "where to begin", cli.non_negative_int, default=0),
    )
    monkeypatch.setitem(METHODS, "every-layer", MethodRow(flags, static(every_layer)))
    assert {"every-layer", "taylor-every-layer", "calibrated-every-layer"} <= set(names())
    assert [flag.name for flag in flags_of("taylor-every-layer")] == ["layers", "shift", "order"]
    assert MethodSettings.from_spec("every-layer:3").values == {"layers": 3, "shift": 0}
    words = ["--model", "DiT-digits/2", "--num-sampling-steps", 4, "--repeats", 0, "--labels", 3]
    words += ["--output", tmp_path / "x.png", "--accelerate-method", "taylor-every-layer"]
    text = run("sample.py", *words, "--layers", 4, "--shift", 1, "--interval", 2)
    assert "schedule (every layer of 4, forecast of order 1): 42 / 96 branches" in text
    assert "--interval has no effect with --accelerate-method taylor-every-layer" in text
    assert "needs --layers, a number" in run("sample.py", *words, status=2)
