"""Schedules that nobody trains: what a learned router has to beat.

| schedule | computes |
|---|---|
| `full_schedule` | everything; with fewer steps this is plain DDIM, the baseline of every table |
| `fora_schedule` | all branches of every N-th step, none between (FORA, Selvaraju et al. 2024) |
| `random_schedule` | all but a given share of the cells, drawn at random |
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
