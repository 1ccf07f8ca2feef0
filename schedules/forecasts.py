"""Forecasts: reused outputs extrapolated along the step axis from the last computed ones.

Each of them is linear in the stored outputs with factors that depend on the steps alone, so all come down to
weights of reuse, whatever the schedule.

| forecast | takes the place of a reused output | source |
|---|---|---|
| `taylor` | a Taylor polynomial of differences | TaylorSeer (Liu et al., ICCV 2025) |
| `hermite` | the same differences with scaled Hermite polynomials | HiCache (2508.16984) |
| `chebyshev` | a ridge regression in Chebyshev polynomials | in the manner of ChebBooster and Spectrum |

`schedules/calibrate.py` has those whose weights are fitted to outputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from router import Schedule

MAX_ORDER = 2
HERMITE_SCALE = 0.5  # HiCache's sigma
CHEBYSHEV_RIDGE = 0.001


def taylor(schedule: Schedule, order: int) -> Schedule:
    """The schedule with reused outputs extrapolated by a Taylor polynomial: TaylorSeer.

    With k the step of the last computed output F and h its distance to the one before, the differences are
    `D1 = (F - F before) / h` and `D2 = (D1 - D1 before) / h`, and step i gets `F + D1 (k - i) + D2 (k - i)^2
    / 2`, as far as `order` goes and as many outputs were computed. Order 0 is plain reuse. Raises ValueError
    for another order than 0, 1 and 2.
    """
    _check_order(order)
    if not order:
        return schedule

    def weights(computed_at: list[int], step: int, _branch: int) -> Tensor:
        d = computed_at[0] - step
        return _of_differences(computed_at, (1.0, d, d**2), order)

    return weighted(schedule, f"forecast of order {order}", order + 1, weights)


def hermite(schedule: Schedule, order: int, sigma: float = HERMITE_SCALE) -> Schedule:
    """The schedule with reused outputs extrapolated in scaled Hermite polynomials: HiCache.

    TaylorSeer's differences, and in place of the powers d^n of the distance d the polynomials `sigma^n
    H_n(sigma d)` with the physicists' Hermite polynomials H_1(x) = 2x and H_2(x) = 4x^2 - 2. With sigma^2 =
    1/2 order 1 is TaylorSeer's; a smaller sigma extrapolates less far. Raises ValueError for an order other
    than 1 and 2.
    """
    _check_order(order, least=1)

    def weights(computed_at: list[int], step: int, _branch: int) -> Tensor:
        x = sigma * (computed_at[0] - step)
        return _of_differences(computed_at, (1.0, sigma * 2 * x, sigma**2 * (4 * x**2 - 2)), order)

    return weighted(schedule, f"Hermite forecast of order {order}, sigma {sigma:g}", order + 1, weights)


def chebyshev(schedule: Schedule, order: int, ridge: float = CHEBYSHEV_RIDGE) -> Schedule:
    """The schedule with reused outputs fitted in Chebyshev polynomials T_0 .. T_order of the step.

    The fit goes through the last `order + 2` computed outputs, on an axis where all steps span [-1, 1]. It is
    a ridge regression: `ridge` weighs the squares of all coefficients but that of T_0. With a ridge of 0 a
    polynomial of this order is met exactly. The papers fit all outputs since the first one in this way; here
    the window bounds the memory. Raises ValueError for an order other than 1 and 2.
    """
    _check_order(order, least=1)
    middle = max(schedule.num_steps - 1, 1) / 2

    def basis(steps: list[int]) -> Tensor:
        x = torch.tensor(steps, dtype=torch.float64) / middle - 1
        return torch.stack([torch.special.chebyshev_polynomial_t(x, n) for n in range(order + 1)], dim=1)

    def weights(computed_at: list[int], step: int, _branch: int) -> Tensor:
        known = min(order + 1, len(computed_at))  # coefficients that these outputs determine
        fitted = basis(computed_at)[:, :known]
        penalty = ridge * torch.diag(torch.tensor([0.0] + [1.0] * (known - 1), dtype=torch.float64))
        solved = torch.linalg.solve(fitted.T @ fitted + penalty, fitted.T)  # (known, outputs)
        return basis([step])[0, :known] @ solved

    name = f"Chebyshev forecast of order {order}, ridge {ridge:g}"
    return weighted(schedule, name, order + 2, weights)


def _check_order(order: int, least: int = 0) -> None:
    if order not in range(least, MAX_ORDER + 1):
        raise ValueError(f"forecast order {order} is not one of {least} .. {MAX_ORDER}")


def weighted(
    schedule: Schedule, name: str, num_terms: int, weights_at: Callable[[list[int], int, int], Tensor]
) -> Schedule:
    """The schedule with the weights (k,) that `weights_at` gives for each of its reused cells.

    weights_at: a function of the steps at which the last outputs were computed, `num_terms` at most and the
    last one first; of the step of the cell; and of its branch.
    """
    num_steps, num_branches = schedule.compute.shape
    weights = torch.zeros(num_steps, num_branches, num_terms, dtype=torch.float64)
    for branch in range(num_branches):
        computed_at: list[int] = []
        for step in reversed(range(num_steps)):
            if schedule.compute[step, branch]:
                computed_at = [step, *computed_at][:num_terms]
            else:
                own = weights_at(computed_at, step, branch)
                weights[step, branch, : len(own)] = own
    return Schedule(schedule.compute, f"{schedule.source}, {name}", weights)


def _of_differences(computed_at: list[int], polynomials: tuple[float, ...], order: int) -> Tensor:
    """Weights (k,) of `sum_n D_n polynomials[n] / n!`, with differences as far as there are outputs."""
    outputs = torch.eye(len(computed_at), dtype=torch.float64)  # row k: the k-th last output as weights
    total, known = polynomials[0] * outputs[0], len(computed_at)
    if known > 1 and order > 0:
        slope = (outputs[0] - outputs[1]) / (computed_at[1] - computed_at[0])
        total = total + slope * polynomials[1]
        if known > 2 and order > 1:
            slope_before = (outputs[1] - outputs[2]) / (computed_at[2] - computed_at[1])
            total = total + (slope - slope_before) / (computed_at[1] - computed_at[0]) * polynomials[2] / 2
    return total
