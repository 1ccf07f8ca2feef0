"""Plans of full steps: the optimum on small cases, by brute force, and what is refused."""

import itertools
import math

import pytest
import torch

from backbones.loading import load_model
from diffusion import create_diffusion
from sampling.loop import Trajectory, denoise_loop
from schedules.forecasts import taylor
from schedules.planned import best_path, bud_cache, dp_cache, full_steps, gap_costs, searched

T = 8


def outputs(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, 20, generator=generator, dtype=torch.float64).cumsum(0)


def forecast_cost(own: torch.Tensor, path: tuple[int, ...]) -> float:
    """The sum over all skipped places of the root mean square error of a line through the last two."""
    total = 0.0
    for place in range(T):
        if place in path:
            continue
        known = [one for one in path if one < place]
        guess = own[known[-1]]
        if len(known) > 1:
            slope = (place - known[-1]) / (known[-1] - known[-2])
            guess = guess + slope * (own[known[-1]] - own[known[-2]])
        total += (own[place] - guess).square().mean().sqrt().item()
    return total


@pytest.mark.parametrize("num_computed", [1, 2, 3, 5, T])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_cheapest_path_is_found(num_computed, seed):
    own = outputs(seed)
    paths = [(0, *rest) for rest in itertools.combinations(range(1, T), num_computed - 1)]
    found = best_path(gap_costs(own), num_computed)
    assert forecast_cost(own, found) == pytest.approx(min(forecast_cost(own, path) for path in paths))
    assert len(found) == num_computed


def test_a_straight_trajectory_needs_two_steps_then_costs_nothing():
    own = torch.arange(T, dtype=torch.float64)[:, None] * torch.ones(1, 3)
    costs = gap_costs(own)
    assert costs[0, 1, T] == pytest.approx(0, abs=1e-6)
    assert costs[T, 0, T] == pytest.approx(sum(range(T)))
    assert math.isinf(costs[3, 2, 5])


@pytest.fixture
def trajectory():
    return Trajectory.of(load_model("DiT-digits/2"), create_diffusion("8"))


def test_plans_are_full_steps_with_the_first(trajectory):
    for build in (dp_cache, lambda *size: bud_cache(*size, evaluations=6)):
        schedule = build(trajectory, 3, 2)
        rows = schedule.compute
        assert rows.all(1).sum() == 3 == rows.any(1).sum()
        assert rows[-1].all()
        with pytest.raises(ValueError, match="9 computed steps are outside 1 .. 8"):
            build(trajectory, 9, 2)


def test_a_plan_for_the_image_is_no_worse_than_even_steps(trajectory):
    tried = {}

    def watched(schedule):
        tried[tuple(schedule.compute[:, 0].tolist())] = schedule
        return taylor(schedule, 1)

    bud_cache(trajectory, 3, 2, evaluations=9, reuse=watched)
    even = full_steps((7, 5, 2), 8, 24).compute[:, 0]
    assert tuple(even.tolist()) in tried
    assert len(tried) <= 9


def test_a_plan_for_the_image_is_measured_on_the_samples_asked_for(trajectory, monkeypatch):
    seen = []

    def watched(trajectory, labels, *rest):
        seen.append(len(labels))
        return denoise_loop(trajectory, labels, *rest)

    monkeypatch.setattr("schedules.planned.denoise_loop", watched)
    bud_cache(trajectory, 2, 3, evaluations=2)
    assert set(seen) == {3}


def test_the_search_finds_the_optimum_of_a_small_case():
    def error(steps) -> float:
        seen.append(steps)
        return 0.01 + sum((a - b) ** 2 for a, b in zip(steps, (9, 7, 2), strict=True))

    seen: list = []
    assert searched(error, 10, 3, 60, seed=0) == (9, 7, 2)
    assert len(seen) == len(set(seen)) <= 60
    assert all(9 in steps for steps in seen)
    assert searched(lambda _: 1.0, 10, 1, 60, seed=0) == (9,)
    assert searched(lambda _: 1.0, 3, 3, 60, seed=0) == (2, 1, 0)
