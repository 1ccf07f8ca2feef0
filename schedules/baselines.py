"""Untrained schedules: the baselines that a learned router has to beat.

| schedule | computes |
|---|---|
| `full_schedule` | everything; with fewer steps this is plain DDIM, the baseline of every table |
| `fora_schedule` | all branches of every N-th step, none between (FORA, Selvaraju et al. 2024) |
| `random_schedule` | all but a random share of the cells |
"""

import math
from fractions import Fraction

import torch

from router import Schedule


def full_schedule(num_steps: int, num_branches: int) -> Schedule:
    return Schedule(torch.ones(num_steps, num_branches, dtype=torch.bool), "every branch computed")


ANCHORS = ("first", "last")


def fora_schedule(
    num_steps: int,
    num_branches: int,
    interval: float | Fraction | str,
    anchor: str = "first",
    first_steps: int = 1,
) -> Schedule:
    """Full compute at every `interval`-th step, and at the `first_steps` steps that are executed first.

    | rule | parameters | computed at T = 10, interval 3 |
    |---|---|---|
    | every N-th step from the first executed (HarmoniCa's tables) | the defaults | 9, 6, 3, 0 |
    | FORA as released, `step == T-1 or step % N == 0` | `anchor="last"` | 9, 6, 3, 0 |
    | TaylorSeer as released, two steps in a row, then every N-th | `first_steps=2` | 9, 8, 5, 2 |

    anchor: `"first"` counts intervals from the last of the leading steps, `"last"` from step 0. A fractional
    interval computes that often on average: 1.5 computes two steps of three; the released codes take whole
    numbers alone. Raises ValueError for an interval below 1, another anchor, or first_steps outside 1 .. T.
    """
    interval = Fraction(str(interval))
    if interval < 1:
        raise ValueError(f"interval {interval} is below 1; 1 computes every step, 2 every other")
    if anchor not in ANCHORS:
        raise ValueError(f"anchor {anchor!r} is unknown; choose one of {', '.join(ANCHORS)}")
    if not 1 <= first_steps <= num_steps:
        raise ValueError(f"first_steps {first_steps} is outside 1 .. {num_steps}, the number of steps")

    def is_computed(step: int) -> bool:
        if step >= num_steps - first_steps:
            return True
        # Distance to the step that intervals are counted from; a new interval begins where the count changes.
        distance = step if anchor == "last" else num_steps - first_steps - step
        return math.floor(distance / interval) != math.floor((distance - 1) / interval)

    table = torch.tensor([[is_computed(step)] * num_branches for step in range(num_steps)])
    source = f"FORA, interval {interval}"
    source += ", anchored at the last step" if anchor == "last" else ""
    source += f", first {first_steps} steps computed" if first_steps > 1 else ""
    return Schedule(table, source)


def random_schedule(num_steps: int, num_branches: int, cur: float, seed: int = 0) -> Schedule:
    """A share `cur` of all cells reused, rounded to whole cells; never the first step.

    Raises ValueError where so many cells cannot be reused.

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
