"""Cache policies: each decides, per step and branch, whether to compute, reuse or blend.

Every branch of the model calls its policy as `cache(branch, run)`, where `run()` computes the branch output,
and uses what it returns as the branch output (before its gate). A policy lives for one trajectory, starts
with an empty store, and is told by the loop over steps which step it is (`cache.step = i`, a Python int).
`cache.computed`, a table of bools (T, B), says before the first step which branches a policy computes at
which steps; None: all of them. `StaticCache` and `SoftCache` never wait for the device.

| policy | branch output | store |
|---|---|---|
| none (`models.compute_always`) | computed | - |
| `StaticCache` | computed where the schedule says so, else combined from the store | what later steps read |
| `FittingCache` | the same; solves the weights of reuse by least squares | the last K outputs |
| `GatedCache` | the same with gates between 0 and 1, differentiable | the last K outputs, moved by the gate |
| `SoftCache` | `score * output + (1 - score) * stored` | that blend, replaced where score > threshold |

`StaticCache` is for sampling, `FittingCache` for calibration, `GatedCache` for end-to-end training, and
`SoftCache` for the training of HarmoniCa and Learning-to-Cache.
"""

from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor

from router import Schedule

Outputs = tuple[Tensor, ...]  # outputs of one branch, the last computed one first
Combine = Callable[[Outputs, Sequence[float] | Tensor], Tensor]


def combined(outputs: Outputs, weights: Sequence[float] | Tensor) -> Tensor:
    """`sum_k weights[k] * outputs[k]`, over as many outputs as there are."""
    total = _times(outputs[0], weights[0])
    for output, weight in zip(outputs[1:], weights[1:], strict=False):
        total = total + _times(output, weight)
    return total


def _times(output: Tensor, weight: float | Tensor) -> Tensor:
    """The product, rounded once; torch would round a 0-d weight to the dtype of the output first."""
    if isinstance(weight, Tensor) and weight.dtype != output.dtype:
        return (output * weight.view([1] * output.ndim)).to(output.dtype)
    return output * weight


class _Store:
    """The stored outputs of every branch. Trajectories that share their first steps copy it."""

    computed: list[list[bool]] | None = None
    _stored: list

    def snapshot(self) -> list:
        return list(self._stored)

    def restore(self, stored: list) -> None:
        self._stored = list(stored)


class StaticCache:
    """Sampling: a reused branch executes none of its layers.

    This is HarmoniCa sec. 3, FORA and Learning-to-Cache; with `Schedule.weights` it is a forecast
    (TaylorSeer) or a learned combination of the last outputs.
    """

    def __init__(
        self, schedule: Schedule, dtype: torch.dtype | None = None, combine: Combine | None = None,
        device: torch.device | None = None,
    ):  # fmt: skip
        """dtype: dtype of the stored outputs; None: as they were computed.

        combine: a function to take the place of `combined`. It gets its weights as tensors (K,) on `device`,
        not as numbers, so that one compiled function serves all cells.
        """
        self.step = schedule.num_steps - 1
        self.computed: list[list[bool]] = schedule.compute.tolist()
        self._kept: list[list[int]] = schedule.kept().tolist()
        self._weights = None
        if schedule.weights is not None:
            weights = schedule.weights
            self._weights = weights.tolist() if combine is None else [*map(list, weights.to(device))]
        self._stored: list[Outputs] = [()] * schedule.num_branches
        self._dtype, self._combine = dtype, combine or combined

    def __call__(self, branch: int, run: Callable[[], Tensor]) -> Tensor:
        stored, kept = self._stored[branch], self._kept[self.step][branch]
        if self.computed[self.step][branch]:
            output = run()
            new = output if self._dtype is None else output.to(self._dtype)
            self._stored[branch] = (new, *stored)[:kept]
            self._computed_dtype = output.dtype
            return output
        self._stored[branch] = stored[:kept]  # drops the outputs that no later step reads
        if self._dtype is not None:
            stored = tuple(output.to(self._computed_dtype) for output in stored)
        if self._weights is None:
            return stored[0]
        return self._combine(stored, self._weights[self.step][branch])

    def stored_bytes(self) -> int:
        return sum(output.nbytes for outputs in self._stored for output in outputs)


class FittingCache(_Store):
    """Calibration: solves the weights of reuse by least squares of each output on the stored outputs.

    Every branch is computed, as the target of its fit. A reused branch returns its fit, so each fit sees the
    errors that `StaticCache` will make with the weights of earlier steps. With `uncached` it returns its own
    output: the fits are those of an uncached trajectory. compute: bool (T, B), the schedule. reduce: sums or
    averages the normal equations over ranks; within a rank they are averaged over the batch.

    Filled in for all cells but those of the first step, computed ones included: `weights` (T, B, K), the
    `gram` matrix (T, B, K, K) of the stored outputs and the mean square `residual` (T, B). The last two tell
    how much the error grows when a weight moves.
    """

    def __init__(
        self,
        compute: Tensor,
        num_terms: int,
        reduce: Callable[[Tensor], Tensor] = lambda t: t,
        uncached: bool = False,
    ):
        size = (*compute.shape, num_terms)
        self.step = len(compute) - 1
        self._schedule, self._reduce, self._uncached = compute.tolist(), reduce, uncached
        self._stored: list[Outputs] = [()] * compute.shape[1]
        self.weights = torch.zeros(size, dtype=torch.float64)
        self.gram = torch.eye(num_terms, dtype=torch.float64).expand(*size, num_terms).clone()
        self.residual = torch.zeros(compute.shape, dtype=torch.float64)

    def __call__(self, branch: int, run: Callable[[], Tensor]) -> Tensor:
        stored, step, output = self._stored[branch], self.step, run()
        num_terms = self.weights.shape[2]
        if stored:
            weights = self._solve(branch, stored, output)
            if not self._schedule[step][branch]:
                return output if self._uncached else combined(stored, weights.tolist())
        self._stored[branch] = (output, *stored[: num_terms - 1])
        return output

    def _solve(self, branch: int, stored: Outputs, output: Tensor) -> Tensor:
        """The weights (k,) by `solve_reuse`, which are noted with what they leave over."""
        rows = torch.stack([one.double().flatten() for one in (*stored, output)])  # (k + 1, values)
        products = self._reduce(rows @ rows.T / rows.shape[1]).cpu()
        weights, matrix, residual = solve_reuse(products[:-1, :-1], products[:-1, -1], products[-1, -1])
        cell, k = (self.step, branch), len(stored)
        self.weights[cell][:k], self.gram[cell][:k, :k], self.residual[cell] = weights, matrix, residual
        return weights


RIDGE = 1e-6  # times the mean square of the stored outputs


def solve_reuse(gram: Tensor, target: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (k,) of stored outputs by least squares on an output; with their matrix and residual.

    gram: (k, k) mean products of the stored outputs; target: (k,), with the output; square: () of the output;
    all float64. The matrix (k, k) is the gram matrix with a ridge, which pulls to plain reuse where the
    stored outputs are nearly collinear. The residual () is the mean square that is left over.
    """
    k = len(target)
    plain = torch.zeros(k, dtype=torch.float64)
    plain[0] = 1
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(k, dtype=torch.float64)
    weights = plain + torch.linalg.solve(gram + ridge, target - gram @ plain)
    residual = (square - 2 * weights @ target + weights @ gram @ weights).clamp(min=0)
    return weights, gram + ridge, residual


class Mode(Enum):
    """What `GatedCache` does in a cell (step, branch)."""

    COMPUTE = "compute the branch and store its output"
    REUSE = "combine stored outputs; the branch is not computed"
    BLEND = "compute the branch and blend it with its reuse by the gate"


class GatedCache(_Store):
    """Training: `gate * output + (1 - gate) * reused`, exactly `StaticCache` where the gates are 0 or 1.

    gates: (T, B), or (T, B, n) with one per sample; under guidance both halves of the batch share theirs.
    weights: (T, B, K), the weights of reuse. Both may require grad. soft: bool (T, B), the cells in
    Mode.BLEND; None: the cells whose gate is neither 0 nor 1, or requires grad. All other cells round their
    gate to Mode.COMPUTE or Mode.REUSE. A branch without stored outputs is always computed.

    In a blended cell the stored outputs move as far as the gate says, to `gate * (output, stored[:-1]) + (1 -
    gate) * stored`. store_gradient: whether this move passes a gradient to the gate. Stored outputs keep
    their graph, so the loss of every later step that reads them reaches the step that computed them.
    """

    def __init__(
        self, gates: Tensor, weights: Tensor, soft: Tensor | None = None, store_gradient: bool = True
    ):
        if soft is None:
            undecided = (gates != 0) & (gates != 1) | gates.requires_grad
            soft = undecided if gates.ndim == 2 else undecided.any(-1)
        self.step = len(gates) - 1
        self.store_gradient, self._num_terms = store_gradient, weights.shape[2]
        # Taken apart into cells: the gradient of an indexed tensor would be as large as the tensor, per cell.
        self._gates = [row.unbind() for row in gates.unbind()]
        self._weights = [row.unbind() for row in weights.unbind()]
        rounded = (gates.detach() if gates.ndim == 2 else gates.detach().mean(-1)) > 0.5
        self._modes = [
            [Mode.BLEND if blend else Mode.COMPUTE if one else Mode.REUSE for one, blend in row]
            for row in torch.stack([rounded, soft.to(rounded.device)], dim=-1).tolist()
        ]
        self.computed = [[mode is not Mode.REUSE for mode in row] for row in self._modes]
        self._stored: list[Outputs] = [()] * gates.shape[1]

    def __call__(self, branch: int, run: Callable[[], Tensor]) -> Tensor:
        mode = self._modes[self.step][branch] if self._stored[branch] else Mode.COMPUTE
        if mode is Mode.REUSE:
            return self._reused(branch)
        output = run()
        return self._blended(branch, output) if mode is Mode.BLEND else self._refreshed(branch, output)

    def _reused(self, branch: int) -> Tensor:
        return combined(self._stored[branch], self._weights[self.step][branch])

    def _refreshed(self, branch: int, output: Tensor) -> Tensor:
        self._stored[branch] = (output, *self._stored[branch][: self._num_terms - 1])
        return output

    def _blended(self, branch: int, output: Tensor) -> Tensor:
        reused, gate, stored = self._reused(branch), self._gate(branch, output), self._stored[branch]
        share = gate if self.store_gradient else gate.detach()
        refreshed = (output, *stored)[: self._num_terms]
        moved = [torch.lerp(old, new, share) for old, new in zip(stored, refreshed, strict=False)]
        grown = [new * share for new in refreshed[len(stored) :]]  # an empty place has nothing to blend with
        self._stored[branch] = (*moved, *grown)
        return torch.lerp(reused, output, gate)

    def _gate(self, branch: int, output: Tensor) -> Tensor:
        """The cell's gate, shaped for a product with a branch output (N, tokens, D)."""
        gate = self._gates[self.step][branch].to(output.dtype)
        if gate.ndim:
            gate = gate.repeat(len(output) // len(gate)).view(-1, *[1] * (output.ndim - 1))
        return gate


class _Blend(torch.autograd.Function):
    """`lerp(stored, output, weight)` with a constant `stored`; keeps only their difference for the gradient.

    Autograd's lerp would keep both tensors, and so the store of every step.
    """

    @staticmethod
    def forward(ctx, stored: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(output - stored, weight)
        return torch.lerp(stored, output, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        difference, weight = ctx.saved_tensors
        grad_output = grad * weight if ctx.needs_input_grad[1] else None
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = torch.linalg.vecdot(grad.flatten(), difference.flatten()).view_as(weight)
        return None, grad_output, grad_weight


class SoftCache(_Store):
    """Training: every branch is computed and blended with the stored output by its score.

    scores: (T, B) in [0, 1], or a sequence of its rows (B,), each of which may require grad. A branch without
    a stored output is computed and stored. straight_through: blend with `1[score > threshold]`, as sampling
    does, and pass the gradient to the score as if the score were the weight of the blend.
    """

    def __init__(self, scores: Tensor | Sequence[Tensor], threshold: float, straight_through: bool = False):
        self.step = len(scores) - 1
        self.scores = scores
        self.threshold = threshold
        self.straight_through = straight_through
        self._stored: list[Tensor | None] = [None] * len(scores[0])

    def __call__(self, branch: int, run: Callable[[], Tensor]) -> Tensor:
        output, stored = run(), self._stored[branch]
        if stored is None:
            self._stored[branch] = output.detach()
            return output
        score = self.scores[self.step][branch]
        refreshed = score > self.threshold
        weight = refreshed + (score - score.detach()) if self.straight_through else score
        blended = _Blend.apply(stored, output, weight.to(output.dtype))
        # The device chooses: to ask `score > threshold` on the host would wait for the device at every
        # branch.
        self._stored[branch] = torch.where(refreshed, blended, stored).detach()
        return blended
