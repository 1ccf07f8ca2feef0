"""The error of x_0 as a linear function of what reused branches return, and schedules for all speeds from it.

Around an uncached trajectory, reuse in cell (i, b) changes x_0 by `J (reused - computed)`, where J is the
Jacobian of x_0 in the branch's output and `reused` is a sum of the branch's outputs at earlier steps. Take
the gradient of `v . x_0` for random v. Its inner products with a branch's outputs at all steps say what *any*
schedule with *any* weights of reuse does to x_0, as long as errors are small. A few backward passes make
these tables; after that the model is not run again. From the tables follow

- an order in which to close cells, each time the one that raises the squared error of x_0 least for what it
  saves: a schedule for every speed (`closing_order`);
- all weights of reuse of a schedule at once, by least squares on x_0 (`solve`). `cache.FittingCache` solves
  those of each cell by itself, on the branch's output.

Errors of different cells add up or cancel in x_0, and this squared error counts that.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from end_to_end.search import Budget
from end_to_end.trajectory import ReferenceTrajectory
from schedules.any_speed import Cell, CellFit, Stored, fit_cell, reused_cells

PROBES = 4  # random directions v for each sample
PRIOR = 1.0  # pull towards the weights of single cells, in mean squares of what a weight does to x_0


class _Recorder:
    """A policy that computes all branches, and takes the gradient of `v . x_0` in the output of each.

    products: (n, B, T, T), of the last backward pass: inner products, by sample, of the gradient at a step
    with the output at a step.
    """

    computed = None

    def __init__(self, num_samples: int, num_steps: int, num_branches: int, device: torch.device):
        self.step, self._num_samples = num_steps - 1, num_samples
        self._outputs: list[Tensor | None] = [None] * num_branches  # each (T, n, values)
        self.products = torch.zeros(num_samples, num_branches, num_steps, num_steps, device=device)

    def snapshot(self) -> None:
        return None

    def restore(self, _stored: None) -> None:
        """Nothing is stored between steps."""

    def __call__(self, branch: int, run: Callable[[], Tensor]) -> Tensor:
        step, output = self.step, run()
        if not output.requires_grad:
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        own = self._by_sample(output.detach())
        if self._outputs[branch] is None:
            self._outputs[branch] = own.new_empty(self.products.shape[-1], *own.shape)
        self._outputs[branch][step] = own
        output.register_hook(lambda gradient: self._multiply(branch, step, gradient))
        return output

    def _by_sample(self, rows: Tensor) -> Tensor:
        """(n, values): under guidance, both rows of a sample together."""
        return rows.unflatten(0, (-1, self._num_samples)).transpose(0, 1).flatten(1)

    def _multiply(self, branch: int, step: int, gradient: Tensor) -> None:
        outputs = self._outputs[branch][step:].float()
        products = torch.einsum("nv,snv->ns", self._by_sample(gradient).float(), outputs)
        self.products[:, branch, step, step:] = products

    def gram(self) -> Tensor:
        """(B, T, T): inner products of a branch's outputs, means over samples and values."""
        grams = []
        for outputs in self._outputs:
            rows = outputs.flatten(1).double()
            grams.append((rows @ rows.T / rows.shape[1]).cpu())
        return torch.stack(grams)


def record(
    reference: ReferenceTrajectory,
    generators: list[torch.Generator],
    probes: int = PROBES,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Tables of one batch: gram (B, T, T) in float64, and projections (n, probes, B, T, T).

    projections[k, p, b, i, s], for s >= i, is of sample k and its v number p: the inner product of the
    gradient of `v . x_0` at cell (i, b) with the branch's output at step s. generators: one per sample, for
    v. recompute: as in `ReferenceTrajectory.rollout`. Samples count by their importance, in the gram alike.
    """
    n, num_steps = len(reference.noise), reference.num_steps
    recorder = _Recorder(n, num_steps, reference.model.num_branches, reference.noise.device)
    with torch.enable_grad():
        *_, (_, x_0) = reference.rollout(recorder, recompute)
        projections = []
        for probe in range(probes):
            v = torch.stack([torch.randn(x_0.shape[1:], generator=one) for one in generators]).to(x_0)
            (x_0 * v).sum().backward(retain_graph=probe + 1 < probes)
            projections.append(recorder.products.cpu().clone())
    own = torch.stack(projections, dim=1)
    if reference.importance is not None:
        own *= reference.importance.cpu().sqrt().view(-1, 1, 1, 1, 1)
    return recorder.gram(), own


@dataclass(frozen=True, eq=False)
class Linearised:
    """The tables of `record`, and what follows from them.

    gram: (B, T, T); projections: (R, B, T, T), a row for each sample and v. num_terms: outputs that reuse
    combines; 0: the last one as it is.
    """

    gram: Tensor
    projections: Tensor
    num_terms: int
    _cells: dict = field(default_factory=dict, repr=False)

    @property
    def num_steps(self) -> int:
        return self.gram.shape[1]

    @property
    def num_branches(self) -> int:
        return self.gram.shape[0]

    def cell(self, step: int, branch: int, stored: Stored) -> tuple[Tensor, CellFit]:
        """What reuse in a cell adds to `v . x_0` (R,), and the least squares that give its weights."""
        key = step, branch, stored
        if key not in self._cells:
            if self.num_terms:
                fit = fit_cell(self.gram[branch], step, stored)
            else:
                fit = CellFit(torch.ones(1, dtype=self.gram.dtype), torch.zeros(1, 1, dtype=self.gram.dtype))
            table = self.projections[:, branch, step]
            self._cells[key] = table[:, list(stored)] @ fit.weights.to(table) - table[:, step], fit
        return self._cells[key]

    def branch_error(self, branch: int, column: list[bool]) -> Tensor:
        """What a branch adds to `v . x_0` (R,) where `column` (T,) says at which steps it is computed."""
        errors = torch.zeros(len(self.projections))
        for step, stored in reused_cells(column, self.num_terms):
            errors = errors + self.cell(step, branch, stored)[0]
        return errors

    def error(self, compute: Tensor) -> float:
        """Mean over samples of the squared error of x_0 that a schedule (T, B) is expected to make."""
        columns = compute.T.tolist()
        return sum(map(self.branch_error, range(self.num_branches), columns)).square().mean().item()

    def closing_order(self, budget: Budget) -> list[Cell]:
        """Cells (step, branch) in the order in which to close them, until the budget is met.

        Each is the one that raises the squared error of x_0 least for its cost, given all that are closed.
        """
        compute = torch.ones(self.num_steps, self.num_branches, dtype=torch.bool)
        of_branch = [torch.zeros(len(self.projections)) for _ in range(self.num_branches)]
        candidates = [self._closings(b, compute) for b in range(self.num_branches)]
        total, order = torch.zeros(len(self.projections)), []
        while budget.spent(compute) > budget.allowed:
            now = total.square().mean()
            _, index, branch = min(
                (*self._least(total - of_branch[b], candidates[b][1], now, budget.costs[b].item()), b)
                for b in range(self.num_branches)
                if candidates[b][0]
            )
            step, errors = candidates[branch][0][index], candidates[branch][1][index]
            compute[step, branch] = False
            order.append((step, branch))
            total = total - of_branch[branch] + errors
            of_branch[branch] = errors
            candidates[branch] = self._closings(branch, compute)
        return order

    def _closings(self, branch: int, compute: Tensor) -> tuple[list[int], Tensor | None]:
        """A branch's computed steps but the first one executed, and its error (S, R) without each."""
        column = compute[:, branch].tolist()
        steps = [step for step in range(self.num_steps - 1) if column[step]]
        errors = []
        for step in steps:
            column[step] = False
            errors.append(self.branch_error(branch, column))
            column[step] = True
        return steps, torch.stack(errors) if errors else None

    @staticmethod
    def _least(others: Tensor, errors: Tensor, now: Tensor, cost: float) -> tuple[float, int]:
        """What the best closing of a branch adds to the squared error, for its cost, and which it is.

        others: (R,), the error of the other branches; errors: (S, R), the branch's after each closing.
        """
        added = ((others + errors).square().mean(1) - now) / cost
        index = int(added.argmin())
        return added[index].item(), index

    def solve(self, compute: Tensor, prior: float = PRIOR) -> tuple[Tensor, float]:
        """Moves (T, B, K) of all weights of reuse at once, by least squares on x_0, and the error to expect.

        A move is one of `AnySpeed.reuse_weights`, in its units. Moves are pulled to 0, the weights of single
        cells, since there are few rows for so many weights.
        """
        moves = torch.zeros(*compute.shape, max(1, self.num_terms), dtype=torch.float64)
        cells, effects = [], []  # effects (R, k) of a cell: what unit moves of its weights do
        errors = torch.zeros(len(self.projections))
        for branch, column in enumerate(compute.T.tolist()):
            for step, stored in reused_cells(column, self.num_terms):
                added, fit = self.cell(step, branch, stored)
                errors = errors + added
                cells.append((step, branch, len(stored)))
                effects.append(self.projections[:, branch, step][:, list(stored)] @ fit.scale.float())
        errors = errors.double()
        if not self.num_terms or not cells:
            return moves, errors.square().mean().item()
        design = torch.cat(effects, dim=1).double()
        normal = design.T @ design / len(design)
        pull = prior * normal.diagonal().mean() * torch.eye(len(normal), dtype=normal.dtype)
        solved = -torch.linalg.solve(normal + pull, design.T @ errors / len(design))
        parts = solved.split([k for _, _, k in cells])
        for (step, branch, k), own in zip(cells, parts, strict=True):
            moves[step, branch, :k] = own
        return moves, (errors + design @ solved).square().mean().item()
