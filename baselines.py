"""Schedules that nobody trains: what a learned router has to beat.

| schedule | computes |
|---|---|
| `full_schedule` | everything; with fewer steps this is plain DDIM, the baseline of every table |
| `fora_schedule` | all branches of every N-th step, none between (FORA, Selvaraju et al. 2024) |
| `random_schedule` | all but a given share of the cells, drawn at random |
| `forecast` | as another one, reused outputs extrapolated (TaylorSeer) |
"""

import math
from fractions import Fraction

import torch

from router import Schedule


def full_schedule(num_steps: int, num_branches: int) -> Schedule:
    return Schedule(torch.ones(num_steps, num_branches, dtype=torch.bool), "every branch computed")


def fora_schedule(num_steps: int, num_branches: int, interval: float | Fraction | str) -> Schedule:
    """Full compute at every `interval`-th step, counted from the first executed (T-1).

    A fractional interval computes that often on average: 1.5 computes two steps of three.
    Raises ValueError below 1.
    """
    interval = Fraction(str(interval))
    if interval < 1:
        raise ValueError(f"interval {interval} is below 1; 1 computes every step, 2 every other")
    periods = [math.floor(k / interval) for k in range(num_steps)]  # k counts executed steps
    computed = [k == 0 or periods[k] != periods[k - 1] for k in range(num_steps)]
    table = torch.tensor(computed[::-1])[:, None].expand(num_steps, num_branches)
    return Schedule(table, f"FORA, interval {interval}")


def random_schedule(num_steps: int, num_branches: int, cur: float, seed: int = 0) -> Schedule:
    """`cur` of all cells reused, to the nearest cell, the first step never. Raises ValueError beyond reach.

    For one seed the reused cells at a lower CUR are among those at a higher one.
    """
    reusable = (num_steps - 1) * num_branches
    reused = round(cur * num_steps * num_branches)
    if not 0 <= reused <= reusable:
        highest = reusable / (num_steps * num_branches)
        raise ValueError(f"CUR {cur:g} is outside 0 .. {highest:g}, what {num_steps} steps can reuse")
    order = torch.randperm(reusable, generator=torch.Generator().manual_seed(seed))
    table = torch.ones(num_steps * num_branches, dtype=torch.bool)
    table[order[:reused]] = False
    return Schedule(table.view(num_steps, num_branches), f"random, CUR {cur:g}, seed {seed}")


MAX_FORECAST_ORDER = 2


def forecast(schedule: Schedule, order: int) -> Schedule:
    """The schedule with reused outputs extrapolated along the step axis: TaylorSeer (Liu et al., ICCV 2025).

    With k the step of the last computed output F and h its distance to the one before, the differences are
    `D1 = (F - F before) / h` and `D2 = (D1 - D1 before) / h`, and step i gets `F + D1 (k - i) + D2 (k - i)^2
    / 2`, as far as `order` goes and as many outputs were computed. All of that is linear in the last order +
    1 outputs, so it comes down to weights. Order 0 is plain reuse. Raises ValueError for another order.
    """
    if order not in range(MAX_FORECAST_ORDER + 1):
        raise ValueError(f"forecast order {order} is not one of 0 .. {MAX_FORECAST_ORDER}")
    if not order:
        return schedule
    num_steps, num_branches = schedule.compute.shape
    weights = torch.zeros(num_steps, num_branches, order + 1, dtype=torch.float64)
    for branch in range(num_branches):
        computed_at: list[int] = []
        for step in reversed(range(num_steps)):
            if schedule.compute[step, branch]:
                computed_at.append(step)
            else:
                weights[step, branch] = _forecast_weights(computed_at[::-1], step, order)
    return Schedule(schedule.compute, f"{schedule.source}, forecast of order {order}", weights)


def _forecast_weights(computed_at: list[int], step: int, order: int) -> torch.Tensor:
    """(order + 1,) of the outputs computed at these steps, the last one first."""
    outputs = torch.eye(order + 1, dtype=torch.float64)  # row k: the k-th last output, in terms of all
    distance = computed_at[0] - step
    total, known = outputs[0].clone(), len(computed_at)
    if known > 1 and order > 0:
        slope = (outputs[0] - outputs[1]) / (computed_at[1] - computed_at[0])
        total += slope * distance
        if known > 2 and order > 1:
            slope_before = (outputs[1] - outputs[2]) / (computed_at[2] - computed_at[1])
            total += (slope - slope_before) / (computed_at[1] - computed_at[0]) * distance**2 / 2
    return total
