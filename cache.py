"""Cache policies: what happens where a branch is, computed, reused or blended.

A policy is called as `cache(branch, compute)` by every branch of the model and returns the branch output
(before its gate). It lives for one trajectory, starts with an empty store, and learns from the sampling loop
which step it is at (`cache.step = i`, a Python int). Nothing is ever read back from the device.

| policy | branch output | store |
|---|---|---|
| none (`models.compute_always`) | computed | - |
| `StaticCache` | computed where the schedule says so, else the stored one | the last computed output |
| `ForecastCache` | computed where the schedule says so, else extrapolated | its last outputs |
| `SoftCache` | `score * computed + (1 - score) * stored` | that blend, replaced where score > threshold |
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from router import Schedule


class StaticCache:
    """Inference: a reused branch executes nothing. Method: HarmoniCa sec. 3, FORA, Learning-to-Cache."""

    def __init__(self, schedule: Schedule):
        self.step = schedule.num_steps - 1
        self._compute: list[list[bool]] = schedule.compute.tolist()
        self._stored: list[Tensor | None] = [None] * schedule.num_branches

    def __call__(self, branch: int, compute: Callable[[], Tensor]) -> Tensor:
        if self._compute[self.step][branch] or self._stored[branch] is None:
            self._stored[branch] = compute()
        return self._stored[branch]


MAX_FORECAST_ORDER = 2


class ForecastCache:
    """Inference: a reused branch is extrapolated along the step axis from its last computed outputs.

    TaylorSeer (Liu et al., ICCV 2025) for any schedule: with k the step of the last computed output F
    and h its distance to the one before, the differences are `D1 = (F - F before) / h` and
    `D2 = (D1 - D1 before) / h`, and step i gets `F + D1 (k - i) + D2 (k - i)^2 / 2`, as far as `order` goes
    and as many outputs were computed. Order 0 is `StaticCache`. Memory: (order + 1) outputs a branch.
    """

    def __init__(self, schedule: Schedule, order: int):
        if order not in range(MAX_FORECAST_ORDER + 1):
            raise ValueError(f"forecast order {order} is not one of 0 .. {MAX_FORECAST_ORDER}")
        self.step = schedule.num_steps - 1
        self.order = order
        self._compute: list[list[bool]] = schedule.compute.tolist()
        self._differences: list[list[Tensor]] = [[] for _ in range(schedule.num_branches)]
        self._computed_at = [self.step] * schedule.num_branches

    def __call__(self, branch: int, compute: Callable[[], Tensor]) -> Tensor:
        known = self._differences[branch]
        if not known or self._compute[self.step][branch]:
            return self._store(branch, compute())
        distance = self._computed_at[branch] - self.step
        output = known[0]
        for n, difference in enumerate(known[1:], start=1):
            output = output + difference * (distance**n / math.factorial(n))
        return output

    def _store(self, branch: int, output: Tensor) -> Tensor:
        before, distance = self._differences[branch], self._computed_at[branch] - self.step
        differences = [output]
        for n in range(min(self.order, len(before))):
            differences.append((differences[n] - before[n]) / distance)
        self._differences[branch], self._computed_at[branch] = differences, self.step
        return output


def sampling_cache(schedule: Schedule, forecast_order: int = 0) -> StaticCache | ForecastCache:
    """The policy of a new trajectory: plain reuse, or a forecast of order 1 or 2."""
    return ForecastCache(schedule, forecast_order) if forecast_order else StaticCache(schedule)


class SoftCache:
    """Training: every branch is computed and blended with the stored output by its score.

    scores: (T, B) in [0, 1], or its rows apart; a row that requires grad passes its gradient on. A branch met
    for the first time is computed and stored. `snapshot` and `restore` let trajectories share a prefix.
    straight_through: blend with `1[score > threshold]`, what sampling will do, and pass the gradient on to
    the score as if it were the blend's weight.
    """

    def __init__(self, scores: Tensor | Sequence[Tensor], threshold: float, straight_through: bool = False):
        self.step = len(scores) - 1
        self.scores = scores
        self.threshold = threshold
        self.straight_through = straight_through
        self._stored: list[Tensor | None] = [None] * len(scores[0])

    def __call__(self, branch: int, compute: Callable[[], Tensor]) -> Tensor:
        computed, stored = compute(), self._stored[branch]
        if stored is None:
            self._stored[branch] = computed.detach()
            return computed
        score = self.scores[self.step][branch]
        refreshed = score > self.threshold
        weight = refreshed + (score - score.detach()) if self.straight_through else score
        blended = weight * computed + (1 - weight) * stored
        # A device-side choice: asking `score > threshold` on the host would wait for the device at every
        # branch.
        self._stored[branch] = torch.where(refreshed, blended, stored).detach()
        return blended

    def snapshot(self) -> list[Tensor | None]:
        return list(self._stored)

    def restore(self, stored: list[Tensor | None]) -> None:
        self._stored = list(stored)
