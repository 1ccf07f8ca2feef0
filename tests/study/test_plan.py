"""The plan: every method at every speed, speeds that are met, ids and commands."""

import itertools
from collections import Counter

import pytest

from backbones.loading import build_model
from schedules.baselines import fora_schedule, random_schedule
from study import measure
from study.measure import Measurement
from study.plan import (
    COMPARED_SAMPLERS,
    EVIDENCE,
    FULL,
    QUICK,
    QUICK_RESULTS,
    SAMPLE_SEEDS,
    SPEEDS,
    Row,
    Training,
    plan,
    random_cur,
    speed_of,
    tasks,
    words,
)
from study.tables import FORECAST, FRESH_SAMPLES, RIVALS

TRAINED = ("harmonica", "harmonica-paper", "l2c", "l2c-every-row", FORECAST)
UNTRAINED = ("fewer-steps", "fora", "taylor-fora", "taylor2-fora", "random")


@pytest.fixture(scope="module")
def full():
    return plan(EVIDENCE, FULL)


def test_plan_compares_every_method_at_three_speeds(full):
    rows = [task.row for task in full if task.row and not task.row.group and task.row.cfg_scale == 1]
    speeds = {}
    for row in rows:
        speeds.setdefault((row.method, row.num_steps), Counter())[row.speed] += 1
    methods = {
        *TRAINED,
        *UNTRAINED,
        "taylor-harmonica",
        "end-to-end",
        "calibrated-fora",
        "calibrated-harmonica",
    }
    for num_steps, seeds in ((10, 3), (20, 3), (50, 1)):
        for method in methods:
            assert len(speeds[method, num_steps]) >= 3, (method, num_steps)
            if method in TRAINED:
                assert set(speeds[method, num_steps].values()) == {seeds}
    assert all(row.samples(FULL) >= 2000 for row in rows)


@pytest.mark.slow
def test_untrained_rows_meet_their_speed_within_four_percent(full):
    """FORA, its forecasts, random and fewer steps, by their settings alone."""
    model = build_model("DiT-digits/2")
    checked = Counter()
    for task in full:
        if task.row and task.row.method in UNTRAINED:
            asked = Measurement.from_arguments(measure.parse_args(task.arguments))
            speedup = asked.load(model).speedup_macs(model, task.row.num_steps)
            assert abs(speedup / float(task.row.speed) - 1) < 0.04, task.id
            checked[task.row.method, task.row.num_steps] += 1
    assert len(checked) == 15
    assert {num_steps for _, num_steps in checked} == set(SPEEDS)


@pytest.mark.parametrize(("folder", "scale"), [(EVIDENCE, FULL), (QUICK_RESULTS, QUICK)])
def test_what_is_needed_stands_before_what_needs_it(folder, scale):
    found = plan(folder, scale)
    before = set()
    for task in found:
        assert set(task.needs) <= before, task.id
        assert task.id not in before
        before.add(task.id)
    used = {need for task in found for need in task.needs}
    assert {task.id for task in found if task.is_training} <= used


def test_samples_of_other_seeds(full):
    by_id = {task.id: task for task in full}
    for id, seed, samples in (
        (f"{FORECAST}-T20-1.96-0", None, 2000),
        (f"{FORECAST}-T20-1.96-0-fresh-seed", SAMPLE_SEEDS[FRESH_SAMPLES], 6000),
        (f"{FORECAST}-T50-1.96-0-fresh-seed", SAMPLE_SEEDS[FRESH_SAMPLES], 2000),
        (f"{FORECAST}-T10-1.96-0", None, 5000),
        ("uncached-T10-cfg1.5", None, 2000),
        ("uncached-T10-ddpm", None, 2000),
    ):
        assert by_id[id].settings.get("seed") == seed, id
        assert by_id[id].settings["samples"] == samples, id


def test_every_router_is_used_under_every_sampler(full):
    """Trained under its own; a row is compared with uncached samples of the sampler of use."""
    by_id = {task.id: task for task in full}
    for own, used in itertools.product(COMPARED_SAMPLERS, repeat=2):
        training, plain = (
            by_id[name if sampler == "ddim" else f"{name}-{sampler}"]
            for name, sampler in (("harmonica-T20-speedup1.96-s0", own), ("uncached-T20", used))
        )
        assert training.settings.get("sampler", "ddim") == own
        for reuse in ("", "calibrated-"):
            name = f"{reuse}harmonica-T20-1.96-0-samplers-trained-with-{own}"
            row = by_id[name if used == "ddim" else f"{name}-{used}"]
            assert row.needs == (training.id, plain.id)
            assert (row.row.sampler, row.row.method) == (used, f"{reuse}harmonica")
            asked = Measurement.from_arguments(measure.parse_args(row.arguments))
            assert asked.sampling.sampler == used


def test_rivals_compute_as_many_steps_as_fora(full):
    rivals = [task.row for task in full if task.row and task.row.group == RIVALS]
    assert {(row.num_steps, row.speed) for row in rivals} == {
        (num_steps, speed.name) for num_steps, speeds in SPEEDS.items() for speed in speeds
    }
    planned = [row for row in rivals if "full_steps" in row.settings]
    for row in planned:
        interval = speed_of(row.num_steps, row.speed).interval
        full_steps = round((1 - fora_schedule(row.num_steps, 1, interval).cur) * row.num_steps)
        assert row.settings["full_steps"] == full_steps
    assert len(planned) == 2 * 15


def test_rows_say_what_they_are_and_which_command_measures_them(tmp_path):
    training = Training("a-router", {"method": "end-to-end", "keep_activations": True, "every_row": False})
    row = Row(
        "mine", 10, {"accelerate_method": "dynamiclayer"}, training, "2", 1, "transfer", 0.5, 1.5, "ddpm"
    )
    assert row.id == "mine-T10-2-1-transfer-0.5-cfg1.5-ddpm"
    assert row.facts == {
        "method": "mine", "router": "routers.safetensors:a-router", "speed": "2", "train_seed": 1,
        "group": "transfer", "variant": 0.5,
    }  # fmt: skip
    train, uncached, own = tasks([row], tmp_path / "a study", FULL)
    assert train.command == "python train_router.py --method end-to-end --keep-activations"
    assert uncached.id == "uncached-T10-cfg1.5-ddpm"
    assert uncached.arguments == words(
        {"num_sampling_steps": 10, "cfg_scale": 1.5, "samples": 2000, "p_sample": True}
    )
    assert own.needs == ("a-router", "uncached-T10-cfg1.5-ddpm")
    assert own.command.startswith("python -m study.measure --num-sampling-steps 10 --cfg-scale 1.5 ")
    assert own.command.endswith("a study/routers.safetensors:a-router'")  # quoted: its folder has a space


def test_training_that_starts_from_another_needs_it(full):
    [task] = [task for task in full if task.id == f"{FORECAST}-from-50-steps-T10-speedup1.96-s0"]
    assert task.needs == (f"{FORECAST}-T50-speedup1.96-s0",)
    assert task.settings["init"] == f"study/results/digits/routers.safetensors:{task.needs[0]}"


def test_random_cur_is_the_one_nearest_to_the_speed():
    cur = random_cur(10, 1.96, 0)
    model = build_model("DiT-digits/2")

    def distance(cur: float) -> float:
        return abs(random_schedule(10, model.num_branches, cur, 0).speedup_macs(model) - 1.96)

    assert all(distance(cur) <= distance(cur + shift) for shift in (-0.05, -0.01, 0.01, 0.05))
