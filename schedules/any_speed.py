"""One router for every speed: an order in which cells are closed, and weights for any of its schedules.

A schedule is what is left after so many cells of the order are closed, as many as the speed-up asks for. Its
weights of reuse are those of least squares on a branch's earlier outputs, from their gram matrices, plus what
training has moved. A move counts in units that are alike for all schedules: the stored outputs of a cell are
made orthonormal, and the unit is the residual of least squares. Moves are trained at some speed-ups, the
anchors, and interpolated in between.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from cache import solve_reuse
from router import ANY_SPEED_FACTS, ANY_SPEED_TENSORS, Router, Schedule

Cell = tuple[int, int]  # step, branch
Stored = tuple[int, ...]  # steps whose outputs a branch has stored, the last computed one first


def closed_cells(order: Sequence[Cell], num_steps: int, num_branches: int) -> Tensor:
    """The schedule (T, B) that computes all cells but these."""
    compute = torch.ones(num_steps, num_branches, dtype=torch.bool)
    for cell in order:
        compute[cell] = False
    return compute


def reused_cells(column: Sequence[bool], num_terms: int) -> Iterator[tuple[int, Stored]]:
    """The reused steps of a branch, in order of execution, with the steps that they read.

    column: (T,), whether the branch is computed.
    """
    stored: Stored = ()
    for step in range(len(column) - 1, -1, -1):
        if column[step] or not stored:
            stored = (step, *stored)[: max(1, num_terms)]
        else:
            yield step, stored


def speedup_macs(compute: Tensor, num_terms: int, model) -> float:
    """Of a schedule (T, B) whose reuse combines all outputs that are stored, num_terms at most."""
    weights = torch.full(
        (*compute.shape, num_terms), 0.5
    )  # any but 1, which would be a copy and cost nothing
    return Schedule(compute, weights=weights).speedup_macs(model)


@dataclass(frozen=True)
class CellFit:
    """Least squares of a cell's output on the stored outputs.

    weights: (k,); scale: (k, k), turns a move of unit length into a change of weights.
    """

    weights: Tensor
    scale: Tensor


def fit_cell(gram: Tensor, step: int, stored: Stored) -> CellFit:
    """gram: (T, T) of one branch, float64."""
    steps = list(stored)
    weights, matrix, residual = solve_reuse(gram[steps][:, steps], gram[steps, step], gram[step, step])
    return CellFit(weights, moving_scale(matrix, residual))


def moving_scale(gram: Tensor, residual: Tensor) -> Tensor:
    """(..., k, k) that turns moves of unit length into changes of reuse weights.

    The outputs that a weight multiplies are large and nearly collinear. In these coordinates they are
    orthonormal, and the unit is the residual of least squares: a move matters equally for every cell. gram:
    (..., k, k) and residual (...), as `cache.solve_reuse` returns them.
    """
    factor = torch.linalg.cholesky(gram)
    return torch.linalg.inv(factor).mT * residual.sqrt()[..., None, None]


def fit_cells(
    gram: Tensor, compute: Tensor, num_terms: int, known: dict | None = None
) -> tuple[Tensor, Tensor]:
    """`fit_cell` of all reused cells of a schedule: weights (T, B, K) and scales (T, B, K, K), float64.

    Weights of computed cells are 1, 0, ..., their scales 0. gram: (B, T, T). known: keeps the fits by cell
    for other schedules of the same gram.
    """
    known = {} if known is None else known
    weights = torch.zeros(*compute.shape, num_terms, dtype=torch.float64)
    scale = torch.zeros(*weights.shape, num_terms, dtype=torch.float64)
    weights[..., 0] = 1
    for branch, column in enumerate(compute.T.tolist()):
        for step, stored in reused_cells(column, num_terms):
            key = step, branch, stored
            if key not in known:
                known[key] = fit_cell(gram[branch], step, stored)
            k = len(stored)
            weights[step, branch] = 0
            weights[step, branch, :k], scale[step, branch, :k, :k] = known[key].weights, known[key].scale
    return weights, scale


def moved(weights: Tensor, scale: Tensor, moves: Tensor) -> Tensor:
    """weights (T, B, K) after moves (T, B, K), in units of scale (T, B, K, K)."""
    return weights + (scale @ moves[..., None])[..., 0]


@dataclass(frozen=True, eq=False)
class AnySpeed:
    """order: (N, 2), cells (step, branch) as they are closed. gram: (B, T, T). moves: (A, T, B, K), a table
    for each of `speedups` (A,), rising. branch_macs, other_macs, branch_size: as a model has them.
    """

    order: Tensor
    gram: Tensor
    moves: Tensor
    speedups: tuple[float, ...]
    branch_macs: tuple[int, ...]
    other_macs: int
    branch_size: int
    _fits: dict = field(default_factory=dict, repr=False)

    @classmethod
    def of_router(cls, router: Router) -> "AnySpeed | None":
        """What a router's file holds of it; None for a router of one speed."""
        if not router.tensors:
            return None
        facts = {name: router.info[name] for name in ANY_SPEED_FACTS}
        for name in ("speedups", "branch_macs"):
            facts[name] = tuple(facts[name])
        order, gram, moves = (router.tensors[name] for name in ANY_SPEED_TENSORS)
        return cls(order.long(), gram.double(), moves.float(), **facts)

    def router(self) -> Router:
        """The router to save. Its scores rise in the order of the cells."""
        rank = torch.full((self.num_steps, self.num_branches), len(self.order), dtype=torch.float32)
        for number, (step, branch) in enumerate(self.order.tolist()):
            rank[step, branch] = number
        router = Router.from_logits(10 * rank / len(self.order) - 5)
        own = self.order.to(torch.int16), self.gram.float(), self.moves.detach().half()
        router.tensors = {
            name: one.cpu().contiguous() for name, one in zip(ANY_SPEED_TENSORS, own, strict=True)
        }
        router.info = {name: getattr(self, name) for name in ANY_SPEED_FACTS}
        return router

    def check_model(self, model) -> None:
        """Raise ValueError for a model whose branches cost others than those of the training."""
        own, found = sum(self.branch_macs) / self.other_macs, sum(model.branch_macs) / model.other_macs
        if abs(own / found - 1) > 1e-3:
            raise ValueError(
                "the router was trained at another image size, where branches cost another share of the "
                "MACs; train one at this size"
            )

    @property
    def num_steps(self) -> int:
        return self.gram.shape[1]

    @property
    def num_branches(self) -> int:
        return self.gram.shape[0]

    @property
    def num_terms(self) -> int:
        return self.moves.shape[-1]

    @cached_property
    def _cells(self) -> list[Cell]:
        return [(step, branch) for step, branch in self.order.tolist()]

    def compute(self, speedup: float) -> Tensor:
        """The schedule (T, B) with the fewest closed cells that reaches this speed-up by MACs.

        Raises ValueError for one that is not offered.
        """
        least, most = self.speedups[0], self.speedups[-1]
        if not 1 <= speedup <= most * (1 + 1e-6):
            raise ValueError(f"speed-up {speedup:g} is not offered; take one from {least:g} to {most:g}")
        low, high = 0, len(self._cells)
        while low < high:
            middle = (low + high) // 2
            compute = closed_cells(self._cells[:middle], self.num_steps, self.num_branches)
            is_enough = speedup_macs(compute, self.num_terms, self) >= speedup
            low, high = (low, middle) if is_enough else (middle + 1, high)
        return closed_cells(self._cells[:low], self.num_steps, self.num_branches)

    def interpolated_moves(self, speedup: float) -> Tensor:
        """(T, B, K), between the anchors in the logarithm of the speed-up; differentiable in `moves`."""
        anchors = torch.tensor(self.speedups).log()
        place = torch.tensor(speedup).log().clamp(anchors[0], anchors[-1])
        upper = int(torch.searchsorted(anchors, place).clamp(1, len(anchors) - 1))
        share = (place - anchors[upper - 1]) / (anchors[upper] - anchors[upper - 1])
        return torch.lerp(self.moves[upper - 1], self.moves[upper], share.item())

    def reuse_weights(self, compute: Tensor, moves: Tensor) -> Tensor:
        """(T, B, K) of a schedule (T, B), differentiable in `moves` (T, B, K)."""
        fitted, scale = fit_cells(self.gram, compute, self.num_terms, self._fits)
        return moved(fitted.to(moves), scale.to(moves), moves)

    def schedule(self, speedup: float) -> Schedule:
        """The schedule that reaches this speed-up by MACs, with its weights. Raises as `compute` does."""
        compute = self.compute(speedup)
        weights = self.reuse_weights(compute, self.interpolated_moves(speedup)).detach()
        return Schedule(compute, f"one router for every speed, at {speedup:g}x", weights)
