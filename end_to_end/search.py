"""Which cells to compute under a budget, searched on the error of the final image.

A schedule starts from full rows (a *skeleton*: some steps computed, all others reused), whose number and
spacing are tried, and grows by single cells: those that `objectives.toggle_effects` says reduce the error of
x_0 most for their cost, in rounds, the weights of reuse solved anew in between. Then cells are exchanged as
long as that helps on fresh noise. Pure mathematics; means over ranks come in as `reduce`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cache import FittingCache, GatedCache
from end_to_end.trajectory import Paired
from router import weights_read
from training.target import Target

WARPS = (0.8, 0.9, 1.0, 1.12, 1.25)  # of a skeleton's spacing; above 1 noisy steps are computed more often
CANDIDATES = tuple((share, WARPS) for share in (0.6, 0.8, 1.0))  # of the budget that full rows take
EARLY = ((1.0, (0.8,)), (1.0, (0.9,)))  # the whole budget as full rows, two spacings
EXCHANGED = 0.02  # share of the budget that the first exchange may move

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Budget:
    """What all cells may cost: (B,) `costs` of a computed one, `combining` of each output that reuse reads.

    num_terms: outputs that reuse combines, where there are as many; 0: none, and it costs nothing.
    """

    costs: Tensor
    combining: float
    num_terms: int
    allowed: float

    @classmethod
    def of(cls, target: Target, num_terms: int) -> "Budget":
        """MACs for a speed-up, a count of computed cells for a CUR.

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

    def early_steps(self, num_steps: int) -> int:
        """How many first steps in a row to compute against samples that small early errors turn into others.

        After two, a forecast has two outputs to go by from the third step on. That pays where more than two
        steps in five can be computed; where fewer can, the gaps that it leaves cost more.
        """
        return 2 if 5 * self.num_rows(num_steps) > 2 * num_steps else 1

    def early_candidates(self, num_steps: int) -> tuple:
        """Shares of full rows, and spacings, to try against samples that small early errors turn into others.

        Full rows alone hold them, and cost little where few steps can be computed. Where more than half can,
        the rows that `early_steps` asks for are enough.
        """
        return CANDIDATES if 2 * self.num_rows(num_steps) > num_steps else EARLY

    def skeletons(
        self, num_steps: int, share: float, warps: Sequence[float] = WARPS, first: int = 1
    ) -> list[Tensor]:
        """Bool tables (T, B) of full rows for this share of the budget, one per spacing.

        first: so many steps in a row are computed before the spacing begins.
        """
        num_rows = self.num_rows(num_steps, share)
        first = min(first, num_rows)
        spaced, rest = num_rows - first + 1, num_steps - first + 1
        tables: list[Tensor] = []
        for warp in warps:
            executed = {int((k / spaced) ** warp * rest + 1e-9) + first - 1 for k in range(spaced)}
            executed |= set(range(first))
            missing = (k for k in range(num_steps) if k not in executed)
            executed |= {next(missing) for _ in range(num_rows - len(executed))}
            table = torch.zeros(num_steps, len(self.costs), dtype=torch.bool)
            table[[num_steps - 1 - k for k in executed]] = True
            if not any(torch.equal(table, other) for other in tables):
                tables.append(table)
        return tables


class Fit(NamedTuple):
    """Weights (T, B, K) of a schedule, the mean squared error of x_0 with them, and how they were found.

    gram: (T, B, K, K), residual: (T, B), as in `cache.FittingCache`; None where there was nothing to solve.
    """

    weights: Tensor
    error: float
    gram: Tensor | None = None
    residual: Tensor | None = None


@torch.no_grad()
def fit(paired: Paired, compute: Tensor, num_terms: int, reduce: Reduce = lambda t: t) -> Fit:
    """Solve a schedule's weights along its own trajectory. num_terms 0: plain reuse, they are ones."""
    if num_terms:
        cache = FittingCache(compute, num_terms, reduce)
        error = _error(paired, cache, reduce)
        return Fit(cache.weights, error, cache.gram, cache.residual)
    weights = torch.ones(*compute.shape, 1, dtype=torch.float64)
    return Fit(weights, _error(paired, GatedCache(compute.float(), weights), reduce))


def _error(paired: Paired, cache, reduce: Reduce) -> float:
    (of_x_0,) = paired.errors(cache)
    return reduce(of_x_0.mean()).item()


def best_of(paired: Paired, tables: Sequence[Tensor], num_terms: int, reduce: Reduce) -> Tensor:
    """The table with the smallest error on this batch."""
    errors = [fit(paired, table, num_terms, reduce).error for table in tables]
    return tables[errors.index(min(errors))]


def spending(compute: Tensor, effects: Tensor, budget: Budget, goal: float) -> Tensor:
    """The schedule that spends `goal`, or a little less: cells are closed where it spends more, then opened.

    effects: (T, B), what toggling a cell does to the error; infinite where that is not known.
    """
    return opened(closed(compute, effects, budget, goal), effects, budget, goal)


def opened(compute: Tensor, effects: Tensor, budget: Budget, goal: float) -> Tensor:
    """The schedule after computing more cells, those first that lower the error most for their cost.

    A cell that would spend more than `goal` is passed over.
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

    Unchanged where it spends `goal` or less.
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
    """Cells (step, branch) and their effect per cost, the least first; not those of the first step."""
    per_cost = effects / budget.costs
    for index in per_cost.flatten().argsort(stable=True).tolist():
        cell = divmod(index, effects.shape[1])
        if cell[0] < len(effects) - 1:
            yield cell, per_cost[cell].item()


def exchanged(compute: Tensor, effects: Tensor, budget: Budget, part: float) -> Tensor:
    """The schedule after opening the most useful reused cells and closing the least useful computed ones.

    Opens at most `part` of the budget, at least one cell, and only where a pair of toggles promises a smaller
    error; the result is within the budget.
    """
    cells = [cell for cell, _ in _by_effect(effects, budget)]
    opening = [cell for cell in cells if not compute[cell]]
    closing = iter([cell for cell in cells if compute[cell]])
    table, moved = compute.clone(), 0.0
    for cell in opening:
        trial, gain = table.clone(), effects[cell].item()
        trial[cell] = True
        while budget.spent(trial) > budget.allowed and (other := next(closing, None)) is not None:
            trial[other] = False
            gain += effects[other].item()
        if budget.spent(trial) > budget.allowed or gain >= 0:
            break
        table, moved = trial, moved + budget.costs[cell[1]].item()
        if moved >= part * budget.allowed:
            break
    return spending(table, effects, budget, budget.allowed)


def interpolated(compute: Tensor, num_steps: int) -> Tensor:
    """A schedule (T, B) for another number of steps, as dense for each branch in every part of the chain."""
    executed = compute.flip(0).double()
    passed = torch.cat([torch.zeros(1, compute.shape[1], dtype=torch.float64), executed.cumsum(0)]) / len(
        compute
    )
    position = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps * len(compute)
    low = position.floor().clamp(max=len(compute) - 1).long()
    share = passed[low] + (position - low)[:, None] * (passed[low + 1] - passed[low])  # (T' + 1, B)
    counted = torch.floor(share * num_steps + 0.5 + 1e-9)
    table = (counted[1:] > counted[:-1]).flip(0)
    table[-1] = True
    return table


def moving_scale(fitted: Fit) -> Tensor:
    """(T, B, K, K): what turns a step of unit length into one of weights that matters equally for every cell.

    The outputs that a weight multiplies are large and nearly collinear. In these coordinates they are
    orthonormal, and the unit is what least squares left over.
    """
    factor = torch.linalg.cholesky(fitted.gram)
    return torch.linalg.inv(factor).mT * fitted.residual.sqrt()[..., None, None]


def learning_rate(lr: float, update: int, num_updates: int) -> float:
    """A short warm-up, then a half cosine to zero."""
    return lr * min(1.0, (update + 1) / 5) * 0.5 * (1 + math.cos(math.pi * update / max(1, num_updates)))
