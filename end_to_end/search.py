"""Which cells to compute under a budget, searched on the error of the final image.

A schedule starts from full rows (a *skeleton*: some steps computed, all others reused). Their number and
spacing are tried. Then it grows cell by cell: it computes those cells that reduce the error of x_0 most for
their cost, as `trajectory.toggle_effects` estimates it, a few rounds of it, and the reuse weights are solved
anew in between. At last cells are exchanged as long as that helps on fresh noise. Pure mathematics: means
over ranks come in as `reduce`. A schedule is here its bool table `compute` (T, B).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cache import FittingCache, GatedCache
from end_to_end.moments import Reduce
from end_to_end.trajectory import ReferenceTrajectory
from router import weights_read
from training.target import Target

# Exponents of a skeleton's spacing; above 1 noisy steps are computed more often.
WARPS = (0.8, 0.9, 1.0, 1.12, 1.25)
# What the search starts from: (share of the budget that full rows take, spacings of which the best is taken).
CANDIDATES = tuple((share, WARPS) for share in (0.6, 0.8, 1.0))
FULL_ROW_CANDIDATES = ((1.0, (0.8,)), (1.0, (0.9,)))
FIRST_EXCHANGE = 0.02  # share of the budget that the first exchange may move


@dataclass(frozen=True)
class Budget:
    """What all computed cells of a schedule may cost together.

    costs: (B,) cost of a computed cell. combining: cost of each stored output that reuse reads. num_terms:
    outputs that reuse combines, where there are as many; with 0 it copies the last one, which costs nothing.
    """

    costs: Tensor
    combining: float
    num_terms: int
    allowed: float

    @classmethod
    def of(cls, target: Target, num_terms: int) -> "Budget":
        """In MACs for a speed-up, in computed cells for a CUR.

        Raises ValueError where nothing is left beyond the first step.
        """
        model, num_steps = target.model, target.num_steps
        costs = torch.tensor(model.branch_macs, dtype=torch.float64)
        if target.kind == "cur":
            allowed = (1 - target.value) * num_steps * len(costs)
            budget = cls(torch.ones_like(costs), 0.0, num_terms, allowed)
        else:
            allowed = num_steps * ((costs.sum().item() + model.other_macs) / target.value - model.other_macs)
            budget = cls(costs, float(model.branch_size), num_terms, allowed)
        first = torch.zeros(num_steps, len(costs), dtype=torch.bool)
        first[-1] = True
        if budget.spent(first) > budget.allowed:
            raise ValueError(
                f"--target-{target.kind} {target.value:g} leaves less than the first step; ask for less"
            )
        return budget

    def spent(self, compute: Tensor) -> float:
        """What this schedule (T, B) costs, as `Schedule.macs` counts it."""
        combined = weights_read(compute, self.num_terms).sum().item() if self.num_terms else 0
        return (compute.double() @ self.costs).sum().item() + self.combining * combined

    def num_rows(self, num_steps: int, share: float = 1.0) -> int:
        """Full rows that this share of the budget pays for, at least one."""
        return max(1, min(num_steps, int(share * self.allowed / self.costs.sum().item() + 1e-9)))

    def leading_steps(self, num_steps: int) -> int:
        """Number of leading steps to compute in full. Small early errors can flip a sample to another image.

        After two of them a forecast has two outputs to go by from the third step on. That pays where more
        than two steps in five can be computed; where fewer can, the gaps that it leaves cost more.
        """
        return 2 if 5 * self.num_rows(num_steps) > 2 * num_steps else 1

    def candidates_for_pool(self, num_steps: int) -> tuple:
        """Candidates for batches that hold many samples which small early errors flip to another image.

        Only full rows keep such samples, and full rows cost little where few steps can be computed. Where
        more than half of the steps can, the `leading_steps` are enough.
        """
        return CANDIDATES if 2 * self.num_rows(num_steps) > num_steps else FULL_ROW_CANDIDATES

    def skeletons(
        self, num_steps: int, share: float, warps: Sequence[float] = WARPS, leading: int = 1
    ) -> list[Tensor]:
        """Schedules (T, B) of full rows for this share of the budget, one per spacing that differs.

        leading: number of steps that are computed in a row before the spacing begins.
        """
        num_rows = self.num_rows(num_steps, share)
        leading = min(leading, num_rows)
        spaced, rest = num_rows - leading + 1, num_steps - leading + 1
        schedules: list[Tensor] = []
        for warp in warps:
            executed = {int((k / spaced) ** warp * rest + 1e-9) + leading - 1 for k in range(spaced)}
            executed |= set(range(leading))
            missing = (k for k in range(num_steps) if k not in executed)
            executed |= {next(missing) for _ in range(num_rows - len(executed))}
            compute = torch.zeros(num_steps, len(self.costs), dtype=torch.bool)
            compute[[num_steps - 1 - k for k in executed]] = True
            if not any(torch.equal(compute, other) for other in schedules):
                schedules.append(compute)
        return schedules


class Fit(NamedTuple):
    """Reuse weights (T, B, K) of a schedule, the mean squared error of x_0 with them, and their equations.

    gram: (T, B, K, K), residual: (T, B), as in `cache.FittingCache`; None where there was nothing to solve.
    """

    reuse_weights: Tensor
    error: float
    gram: Tensor | None = None
    residual: Tensor | None = None


def _alone(own: Tensor) -> Tensor:
    """The mean over the ranks of a single process."""
    return own


@torch.no_grad()
def fit(reference: ReferenceTrajectory, compute: Tensor, num_terms: int, reduce: Reduce = _alone) -> Fit:
    """Solve a schedule's reuse weights along its own trajectory. num_terms 0: plain reuse, they are ones."""
    if num_terms:
        cache = FittingCache(compute, num_terms, reduce)
        error = _error(reference, cache, reduce)
        return Fit(cache.weights, error, cache.gram, cache.residual)
    ones = torch.ones(*compute.shape, 1, dtype=torch.float64)
    return Fit(ones, _error(reference, GatedCache(compute.float(), ones), reduce))


def _error(reference: ReferenceTrajectory, cache: FittingCache | GatedCache, reduce: Reduce) -> float:
    """Mean squared error of x_0, over the samples of all ranks."""
    (errors,) = reference.errors(cache)
    return reduce(errors.mean()).item()


def best_of(
    reference: ReferenceTrajectory, schedules: Sequence[Tensor], num_terms: int, reduce: Reduce
) -> Tensor:
    """The schedule with the smallest error on this batch."""
    errors = [fit(reference, compute, num_terms, reduce).error for compute in schedules]
    return schedules[errors.index(min(errors))]


def spending(compute: Tensor, effects: Tensor, budget: Budget, goal: float) -> Tensor:
    """The schedule that spends `goal`, or a little less: it closes cells where it spends more, then opens.

    effects: (T, B), the change of the error by toggling each cell; infinite where it is not known.
    """
    return opened(closed(compute, effects, budget, goal), effects, budget, goal)


def opened(compute: Tensor, effects: Tensor, budget: Budget, goal: float) -> Tensor:
    """The schedule after computing more cells, those first that lower the error most for their cost.

    It passes over a cell that would spend more than `goal`.
    """
    compute = compute.clone()
    for cell, effect in _by_effect(effects, budget):
        if effect == torch.inf:
            break  # not known: left for another step of the search
        if not compute[cell]:
            compute[cell] = True
            if budget.spent(compute) > goal:
                compute[cell] = False
    return compute


def closed(compute: Tensor, effects: Tensor, budget: Budget, goal: float) -> Tensor:
    """The schedule after reusing more cells, those first that raise the error least for what they save.

    It is unchanged where it spends `goal` or less.
    """
    compute, spent = compute.clone(), budget.spent(compute)
    for cell, _ in _by_effect(effects, budget):
        if spent <= goal:
            break
        if compute[cell]:
            compute[cell] = False
            spent = budget.spent(compute)
    return compute


def _by_effect(effects: Tensor, budget: Budget) -> Iterator[tuple[tuple[int, int], float]]:
    """Cells (step, branch) and their effect per cost, the least first. The first step's are left out."""
    per_cost = effects / budget.costs
    for index in per_cost.flatten().argsort(stable=True).tolist():
        cell = divmod(index, effects.shape[1])
        if cell[0] < len(effects) - 1:
            yield cell, per_cost[cell].item()


def exchanged(compute: Tensor, effects: Tensor, budget: Budget, share: float) -> Tensor:
    """The schedule after opening the most useful reused cells and closing the least useful computed ones.

    It opens at most `share` of the budget but at least one cell, and only where a pair of toggles promises a
    smaller error. The result is within the budget.
    """
    cells = [cell for cell, _ in _by_effect(effects, budget)]
    reused = [cell for cell in cells if not compute[cell]]
    computed = iter([cell for cell in cells if compute[cell]])
    exchange, moved = compute.clone(), 0.0
    for cell in reused:
        trial, change = exchange.clone(), effects[cell].item()
        trial[cell] = True
        while budget.spent(trial) > budget.allowed and (other := next(computed, None)) is not None:
            trial[other] = False
            change += effects[other].item()
        if budget.spent(trial) > budget.allowed or change >= 0:
            break
        exchange, moved = trial, moved + budget.costs[cell[1]].item()
        if moved >= share * budget.allowed:
            break
    return spending(exchange, effects, budget, budget.allowed)


def interpolated(compute: Tensor, num_steps: int) -> Tensor:
    """The schedule for another number of steps: each branch as dense in every part of the chain."""
    executed = compute.flip(0).double()
    passed = torch.cat([torch.zeros(1, compute.shape[1], dtype=torch.float64), executed.cumsum(0)]) / len(
        compute
    )
    position = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps * len(compute)
    low = position.floor().clamp(max=len(compute) - 1).long()
    share = passed[low] + (position - low)[:, None] * (passed[low + 1] - passed[low])  # (T' + 1, B)
    counted = torch.floor(share * num_steps + 0.5 + 1e-9)
    schedule = (counted[1:] > counted[:-1]).flip(0)
    schedule[-1] = True
    return schedule


def learning_rate(lr: float, update: int, num_updates: int) -> float:
    """A short warm-up, then a half cosine to zero."""
    return lr * min(1.0, (update + 1) / 5) * 0.5 * (1 + math.cos(math.pi * update / max(1, num_updates)))
