"""Cache policies: what happens where a branch is, computed, reused or blended.

A policy is called as `cache(branch, compute)` by every branch of the model and returns the branch output
(before its gate). It lives for one trajectory, starts with an empty store, and learns from the sampling loop
which step it is at (`cache.step = i`, a Python int). Static and soft never wait for the device. `computed`
says beforehand at which steps a policy computes which branches, None: everywhere.

| policy | branch output | store |
|---|---|---|
| none (`models.compute_always`) | computed | - |
| `StaticCache` | computed where the schedule says so, else combined from the stored | what will be read |
| `FittingCache` | the same, its weights solved by least squares as it goes | the last K computed |
| `GatedCache` | the same with gates between 0 and 1, differentiable | the same, moved on by the gate |
| `SoftCache` | `score * computed + (1 - score) * stored` | that blend, replaced where score > threshold |

The first three are what is sampled and what end-to-end training differentiates; `SoftCache` is HarmoniCa's
and Learning-to-Cache's training.
"""

from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor

from router import Schedule

Outputs = tuple[Tensor, ...]  # of one branch, the last computed one first
Combine = Callable[[Outputs, Sequence[float] | Tensor], Tensor]


def combined(outputs: Outputs, weights: Sequence[float] | Tensor) -> Tensor:
    """`sum_k weights[k] * outputs[k]` over the outputs that there are."""
    total = _times(outputs[0], weights[0])
    for output, weight in zip(outputs[1:], weights[1:], strict=False):
        total = total + _times(output, weight)
    return total


def _times(output: Tensor, weight: float | Tensor) -> Tensor:
    """Rounded once, at the end, whatever the weight is: a tensor of no dimensions would be rounded first."""
    if isinstance(weight, Tensor) and weight.dtype != output.dtype:
        return (output * weight.view([1] * output.ndim)).to(output.dtype)
    return output * weight


class _Store:
    """What a policy keeps of every branch; trajectories that share a prefix copy it."""

    computed: list[list[bool]] | None = None
    _stored: list

    def snapshot(self) -> list:
        return list(self._stored)

    def restore(self, stored: list) -> None:
        self._stored = list(stored)


class StaticCache:
    """Inference: a reused branch executes none of its layers.

    HarmoniCa sec. 3, FORA, Learning-to-Cache, and with `Schedule.weights` forecasts (TaylorSeer) and learned
    combinations.
    """

    def __init__(
        self, schedule: Schedule, dtype: torch.dtype | None = None, combine: Combine | None = None,
        device: torch.device | None = None,
    ):  # fmt: skip
        """dtype: of what is stored; None: as it was computed.

        combine: what stands for `combined`; it has its weights as tensors (K,) on `device`, not as numbers,
        so that one compiled function serves all cells.
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

    def __call__(self, branch: int, compute: Callable[[], Tensor]) -> Tensor:
        stored, kept = self._stored[branch], self._kept[self.step][branch]
        if self.computed[self.step][branch]:
            output = compute()
            new = output if self._dtype is None else output.to(self._dtype)
            self._stored[branch] = (new, *stored)[:kept]
            self._computed_dtype = output.dtype
            return output
        self._stored[branch] = stored[:kept]  # the last reader of an output lets go of it
        if self._dtype is not None:
            stored = tuple(output.to(self._computed_dtype) for output in stored)
        if self._weights is None:
            return stored[0]
        return self._combine(stored, self._weights[self.step][branch])

    def stored_bytes(self) -> int:
        return sum(output.nbytes for outputs in self._stored for output in outputs)


class FittingCache(_Store):
    """Sampling that solves the weights of its reuse: least squares of each output on the stored ones.

    Every branch is computed, so that there is something to fit; what is returned, and so all that follows, is
    what `StaticCache` will do with `weights`. Equations are summed over the batch, and by `reduce` over
    ranks. `weights`, and the `gram` matrix of the stored outputs and mean square `residual` that tell how far
    a weight may move, are filled in for all cells but those of the first step; where a cell is computed they
    are what it could be replaced with.
    """

    def __init__(self, compute: Tensor, num_terms: int, reduce: Callable[[Tensor], Tensor] = lambda t: t):
        size = (*compute.shape, num_terms)
        self.step = len(compute) - 1
        self._compute, self._reduce = compute.tolist(), reduce
        self._stored: list[Outputs] = [()] * compute.shape[1]
        self.weights = torch.zeros(size, dtype=torch.float64)
        self.gram = torch.eye(num_terms, dtype=torch.float64).expand(*size, num_terms).clone()
        self.residual = torch.zeros(compute.shape, dtype=torch.float64)

    def __call__(self, branch: int, compute: Callable[[], Tensor]) -> Tensor:
        stored, step, output = self._stored[branch], self.step, compute()
        num_terms = self.weights.shape[2]
        if stored:
            weights = self._solve(branch, stored, output)
            if not self._compute[step][branch]:
                return combined(stored, weights.tolist())
        self._stored[branch] = (output, *stored[: num_terms - 1])
        return output

    def _solve(self, branch: int, stored: Outputs, output: Tensor) -> Tensor:
        """Normal equations in float64, drawn towards plain reuse where outputs are nearly collinear."""
        rows = torch.stack([one.double().flatten() for one in (*stored, output)])  # (k + 1, values)
        products = self._reduce(rows @ rows.T / rows.shape[1]).cpu()
        gram, target, k = products[:-1, :-1], products[:-1, -1], len(stored)
        plain = torch.zeros(k, dtype=torch.float64)
        plain[0] = 1
        ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(k, dtype=torch.float64)
        weights = plain + torch.linalg.solve(gram + ridge, target - gram @ plain)
        cell = self.step, branch
        self.weights[cell][:k], self.gram[cell][:k, :k] = weights, gram + ridge
        self.residual[cell] = (products[-1, -1] - 2 * weights @ target + weights @ gram @ weights).clamp(
            min=0
        )
        return weights


RIDGE = 1e-6  # of the mean square of the stored outputs


class Mode(Enum):
    """What `GatedCache` does in a cell (step, branch)."""

    COMPUTE = "as a schedule that computes it"
    REUSE = "as a schedule that reuses it: the branch is not computed"
    BLEND = "compute and reuse, blended by the gate"


class GatedCache(_Store):
    """Training: `gate * computed + (1 - gate) * reused`, exactly `StaticCache` where the gates are 0 or 1.

    gates: (T, B), or (T, B, n) one for each sample; under guidance both halves of the batch share theirs.
    weights: (T, B, K) of the reuse. Both may require grad. soft: bool (T, B), the cells that are blended; the
    others follow their gate, rounded, and compute nothing that they do not need. None: blended are the cells
    whose gate is neither 0 nor 1, or requires grad. The store moves on as far as the gate says: `gate *
    (computed, outputs but the oldest) + (1 - gate) * outputs`; with `store_gradient` False only its values
    follow the gate, the gradient does not. Stored outputs keep their graph: the loss of every later reader
    reaches the step that computed them.
    """

    def __init__(
        self, gates: Tensor, weights: Tensor, soft: Tensor | None = None, store_gradient: bool = True
    ):
        if soft is None:
            undecided = (gates != 0) & (gates != 1) | gates.requires_grad
            soft = undecided if gates.ndim == 2 else undecided.any(-1)
        self.step = len(gates) - 1
        self.store_gradient, self._num_terms = store_gradient, weights.shape[2]
        # Cell by cell: the gradient of an indexed tensor would be as large as the tensor, for each cell.
        self._gates = [row.unbind() for row in gates.unbind()]
        self._weights = [row.unbind() for row in weights.unbind()]
        rounded = (gates.detach() if gates.ndim == 2 else gates.detach().mean(-1)) > 0.5
        self._modes = [
            [Mode.BLEND if blend else Mode.COMPUTE if one else Mode.REUSE for one, blend in row]
            for row in torch.stack([rounded, soft.to(rounded.device)], dim=-1).tolist()
        ]
        self.computed = [[mode is not Mode.REUSE for mode in row] for row in self._modes]
        self._stored: list[Outputs] = [()] * gates.shape[1]

    def __call__(self, branch: int, compute: Callable[[], Tensor]) -> Tensor:
        mode = self._modes[self.step][branch] if self._stored[branch] else Mode.COMPUTE
        if mode is Mode.REUSE:
            return self._reused(branch)
        output = compute()
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
        grown = [new * share for new in refreshed[len(stored) :]]  # a place that was empty: nothing to blend
        self._stored[branch] = (*moved, *grown)
        return torch.lerp(reused, output, gate)

    def _gate(self, branch: int, output: Tensor) -> Tensor:
        """The cell's gate, shaped for a product with a branch output (N, tokens, D)."""
        gate = self._gates[self.step][branch].to(output.dtype)
        if gate.ndim:
            gate = gate.repeat(len(output) // len(gate)).view(-1, *[1] * (output.ndim - 1))
        return gate


class _Blend(torch.autograd.Function):
    """`lerp(stored, computed, weight)`, keeping their difference alone for its gradient.

    stored is a constant; what autograd would keep of lerp is both, and the store before it moved on.
    """

    @staticmethod
    def forward(ctx, stored: Tensor, computed: Tensor, weight: Tensor) -> Tensor:
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(computed - stored, weight)
        return torch.lerp(stored, computed, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        difference, weight = ctx.saved_tensors
        of_computed = grad * weight if ctx.needs_input_grad[1] else None
        of_weight = None
        if ctx.needs_input_grad[2]:
            of_weight = torch.linalg.vecdot(grad.flatten(), difference.flatten()).view_as(weight)
        return None, of_computed, of_weight


class SoftCache(_Store):
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
        blended = _Blend.apply(stored, computed, weight.to(computed.dtype))
        # A device-side choice: asking `score > threshold` on the host would wait for the device at every
        # branch.
        self._stored[branch] = torch.where(refreshed, blended, stored).detach()
        return blended
