"""Forecasts as weights of reuse: each meets what its basis can express, and its formula by hand."""

import math

import numpy as np
import pytest
import torch

from cache import StaticCache
from router import Schedule
from schedules.calibrate import mode_weights
from schedules.forecasts import chebyshev, hermite, taylor

T = 12


def table(steps) -> Schedule:
    compute = torch.zeros(T, 1, dtype=torch.bool)
    compute[list(steps)] = True
    return Schedule(compute)


def run(schedule: Schedule, outputs) -> list[float]:
    """What a cache returns at every step where `outputs(step)` are the branch's own outputs."""
    cache, seen = StaticCache(schedule), [0.0] * T
    for step in reversed(range(T)):
        cache.step = step
        seen[step] = cache(
            0, lambda step=step: torch.tensor(float(outputs(step)), dtype=torch.float64)
        ).item()
    return seen


FORECASTS = {
    "taylor": taylor,
    "chebyshev": lambda schedule, order: chebyshev(schedule, order, 0.0),
    "hermite": lambda schedule, order: hermite(schedule, order, math.sqrt(0.5)),
}


@pytest.mark.parametrize(
    ("name", "order", "steps"),
    [("taylor", 1, (11, 9, 6)), ("hermite", 1, (11, 9, 6)), ("chebyshev", 1, (11, 9, 8, 6)),
     ("chebyshev", 2, (11, 10, 8, 6)), ("chebyshev", 2, (11, 8, 6))],
)  # fmt: skip
def test_a_polynomial_of_the_order_is_met(name, order, steps):
    own = (lambda step: 3 - 2 * step) if order == 1 else (lambda step: 1 - step + 0.5 * step**2)
    seen = run(FORECASTS[name](table(steps), order), own)
    last = min(steps)
    assert seen[:last] == pytest.approx([own(step) for step in range(last)], abs=2e-4)
    off = run(FORECASTS[name](table(steps), order), lambda step: step**4)
    assert off[0] != pytest.approx(0, abs=1)


def test_hermite_by_hand():
    """f = step^2, computed at 11, 9, 8: D1 = -17, D2 = (-17 + 20) / 1; at distance 4 and sigma 1/2."""
    x = 0.5 * 4
    expected = 64 - 17 * 0.5 * 2 * x + 3 / 2 * 0.25 * (4 * x**2 - 2)
    assert run(hermite(table((11, 9, 8)), 2), lambda step: step**2)[4] == pytest.approx(expected)


def test_a_smaller_sigma_and_a_larger_ridge_extrapolate_less():
    def change(schedule) -> float:
        return abs(run(schedule, lambda step: 5 * step)[0] - 30)

    steps = table((11, 9, 6))
    assert change(hermite(steps, 1, 0.3)) < change(hermite(steps, 1, 0.5)) < change(taylor(steps, 1))
    assert change(chebyshev(steps, 1, 1.0)) < change(chebyshev(steps, 1, 0.01)) < change(taylor(steps, 1))


@pytest.mark.parametrize("build", [hermite, chebyshev])
def test_other_orders_are_refused(build):
    with pytest.raises(ValueError, match="order 3 is not one of 1 .. 2"):
        build(table((11,)), 3)


@pytest.mark.parametrize("modes", [(0.9, 0.5), (1.1, -0.4), (0.8 + 0.3j, 0.8 - 0.3j)])
def test_two_modes_are_met(modes):
    """Outputs a m_1^k + b m_2^k of several values, at k = 0 (the oldest), 1, 2: the next is at 3."""
    shares = np.random.default_rng(0).standard_normal(5) + 1j * np.random.default_rng(1).standard_normal(5)
    pairs = shares if abs(modes[0].imag) else shares.real

    def outputs(k):
        other = pairs.conj() if np.iscomplexobj(pairs) else pairs[::-1]
        return (pairs * complex(modes[0]) ** k + other * complex(modes[1]) ** k).real

    last = np.stack([outputs(2), outputs(1), outputs(0)])
    for distance in (1, 2):
        weights = mode_weights(last @ last.T, distance)
        np.testing.assert_allclose(weights @ last[:2], outputs(2 + distance), rtol=1e-6)


def test_modes_that_are_no_basis_are_told():
    assert mode_weights(np.zeros((3, 3)), 0.5) is None
