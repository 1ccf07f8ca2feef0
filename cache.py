"""Cache policies: what happens where a branch is, computed, reused or blended.

A policy is called as `cache(branch, compute)` by every branch of the model and returns the branch output
(before its gate). It lives for one trajectory, starts with an empty store, and learns from the sampling loop
which step it is at (`cache.step = i`, a Python int). Nothing is ever read back from the device.

| policy | branch output | store |
|---|---|---|
| none (`models.compute_always`) | computed | - |
| `StaticCache` | computed where the schedule says so, else the stored one | the last computed output |
| `SoftCache` | `score * computed + (1 - score) * stored` | that blend, replaced where score > threshold |
"""

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


class SoftCache:
    """Training: every branch is computed and blended with the stored output by its score.

    scores: (T, B) in [0, 1], or its rows apart; a row that requires grad passes its gradient on. A branch met
    for the first time is computed and stored. `snapshot` and `restore` let trajectories share a prefix.
    """

    def __init__(self, scores: Tensor | Sequence[Tensor], threshold: float):
        self.step = len(scores) - 1
        self.scores = scores
        self.threshold = threshold
        self._stored: list[Tensor | None] = [None] * len(scores[0])

    def __call__(self, branch: int, compute: Callable[[], Tensor]) -> Tensor:
        computed, stored = compute(), self._stored[branch]
        if stored is None:
            self._stored[branch] = computed.detach()
            return computed
        score = self.scores[self.step][branch]
        blended = score * computed + (1 - score) * stored
        # A device-side choice: asking `score > threshold` on the host would wait for the device at every
        # branch.
        self._stored[branch] = torch.where(score > self.threshold, blended, stored).detach()
        return blended

    def snapshot(self) -> list[Tensor | None]:
        return list(self._stored)

    def restore(self, stored: list[Tensor | None]) -> None:
        self._stored = list(stored)
