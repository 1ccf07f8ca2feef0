"""Caches that decide while they sample: compute the rest of a step, or reuse it, by a signal and a threshold.

A `Rule` says how one decides. In every step the policy takes the signal's relative change `mean |new - old| /
mean |old|`, and where that is below `tolerance` all branches between the `first_blocks` and the `last_blocks`
are reused. The methods of `thresholds.py` are values of its fields:

| method | signal | compared with the signal of | below the tolerance |
|---|---|---|---|
| first block | residual of the first block | the last computed step | the change |
| DBCache | residual of the first F blocks | the last computed step | the change |
| TeaCache | modulated input of the first block | the step before | the sum of rescaled changes since then |

One decision is for the whole batch, or one for each sample. A sample's own signal decides for it then, both
halves under guidance together: a step is computed for all samples where one needs it, and those that do not
keep their reuse. So a sample's result does not depend on its batch, and its cost is its own. Time is saved
only where all agree, as a batch of one does.

A reused branch returns its own last output, under the gates of the new step, or its linear forecast. The
libraries of these methods store one residual for all blocks between; the decisions are the same functions of
the signal.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backbones.contract import Backbone
from backbones.denoiser import halves
from backbones.stream import block_starts
from cache import Outputs, combined
from sampling.loop import Trajectory


class Tally:
    """How many samples computed each cell (step, branch), over all trajectories since it was made.

    cells: (T, B), samples: (T,), products: weights that reused branches were multiplied by, all summed.
    """

    def __init__(self, num_steps: int, num_branches: int):
        self.cells = torch.zeros(num_steps, num_branches, dtype=torch.float64)
        self.samples = torch.zeros(num_steps, dtype=torch.float64)
        self.products = torch.zeros(1, dtype=torch.float64)

    def add(self, step: int, samples: int, reused: int, branches: range, terms: int) -> None:
        """One step of some samples; terms: weights summed over those that reused `branches`."""
        self.samples[step] += samples
        self.cells[step] += samples
        self.cells[step, branches.start : branches.stop] -= reused
        self.products += terms * len(branches)

    def gather(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Add what the other processes have counted."""
        parts = (self.cells, self.samples, self.products)
        summed = sum_over_ranks(torch.cat([part.flatten() for part in parts]))
        for part, own in zip(parts, summed.split([part.numel() for part in parts]), strict=True):
            part.copy_(own.view_as(part))


@dataclass(frozen=True)
class Rule:
    """How a cache decides, see above. tally: what it has decided so far.

    first_blocks: always computed; 0: the signal is the modulated input of the first block. warm_up: leading
    steps that are computed, at least one. most_reused: steps in a row that are reused at most; None: no
    limit. accumulates: compare the sum of changes since the last computed step, each of them the polynomial
    `rescale` (highest power first; empty: as it is) of the change since the step before. last_step: compute
    it. forecast: extrapolate reused outputs from the last two computed ones. per_sample: one decision each.
    """

    name: str
    num_steps: int
    branches: tuple[str, ...] = field(repr=False)
    tolerance: float
    first_blocks: int = 1
    last_blocks: int = 0
    warm_up: int = 1
    most_reused: int | None = None
    accumulates: bool = False
    rescale: tuple[float, ...] = ()
    last_step: bool = False
    forecast: bool = False
    per_sample: bool = False
    tally: Tally = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        depth = len(block_starts(self.branches))
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance {self.tolerance} is negative; give 0 or more")
        if self.first_blocks + self.last_blocks >= depth:
            raise ValueError(
                f"{self.first_blocks} first and {self.last_blocks} last blocks are always computed, and the "
                f"model has {depth}: none is left to reuse; give fewer"
            )
        if self.warm_up >= self.num_steps:
            raise ValueError(
                f"warm-up {self.warm_up} leaves none of {self.num_steps} steps to reuse; give a smaller one"
            )
        object.__setattr__(self, "tally", Tally(self.num_steps, self.num_branches))

    @property
    def source(self) -> str:
        """A line for people, as a schedule has it."""
        return f"{self.name}, tolerance {self.tolerance:.4g}" + (", per sample" if self.per_sample else "")

    @property
    def num_branches(self) -> int:
        return len(self.branches)

    @property
    def reusable(self) -> range:
        """The branches that may be reused."""
        starts = [*block_starts(self.branches), self.num_branches]
        return range(starts[self.first_blocks], starts[len(starts) - 1 - self.last_blocks])

    def cache(self, trajectory: Trajectory, dtype: torch.dtype | None = None) -> "DynamicCache":
        """The policy of one run. dtype: dtype of the stored outputs; None: as they were computed."""
        return DynamicCache(
            self, trajectory.backbone, halves(trajectory.backbone, trajectory.cfg_scale), dtype
        )

    def rescaled(self, change: float) -> float:
        value = 0.0
        for coefficient in self.rescale:
            value = value * change + coefficient
        return value if self.rescale else change

    # ---- what was reached, as a schedule says it of itself

    def computed(self) -> Tensor:
        """(T, B) share of the samples so far that computed each cell, float64."""
        assert self.tally.samples.all(), "nothing was sampled yet"
        return self.tally.cells / self.tally.samples[:, None]

    @property
    def cur(self) -> float:
        """Cache utilization ratio over the samples so far."""
        return 1.0 - self.computed().mean().item()

    def macs(self, model: Backbone) -> float:
        """MACs of one sample's trajectory on average over the samples so far, without guidance."""
        branches = self.computed() @ torch.tensor(model.branch_macs, dtype=torch.float64)
        forecast = self.tally.products.item() / self.tally.samples[0].item() * model.branch_size
        return branches.sum().item() + forecast + self.num_steps * model.other_macs

    def speedup_macs(self, model: Backbone) -> float:
        """MACs of the uncached trajectory over those that were needed on average."""
        return self.num_steps * (sum(model.branch_macs) + model.other_macs) / self.macs(model)

    def stored_outputs(self) -> int:
        """The most branch outputs that the store holds at once."""
        return len(self.reusable) * (2 if self.forecast else 1)


class DynamicCache:
    """The policy of a `Rule`, for one trajectory. Under guidance a sample has `halves` rows in every batch.

    It reads its signal from the model's hooks, which go with it. A decision waits for the device once a step.
    """

    computed = None  # not known ahead

    def __init__(self, rule: Rule, model: Backbone, halves: int = 1, dtype: torch.dtype | None = None):
        if getattr(model, "watch_stream", None) is None:
            raise ValueError(
                f"{type(model).__name__} cannot be watched at run time; take a schedule, such as fora"
            )
        self.rule, self.step = rule, rule.num_steps - 1
        self._halves, self._dtype, self._reusable = halves, dtype, rule.reusable
        self._signal: Tensor | None = None  # of this step, (rows, ..., D)
        self._old: Tensor | None = None  # what it is compared with, (G, values)
        self._decided: int | None = None  # the step that was decided last
        self._stored: dict[int, Outputs] = {}
        if rule.first_blocks:
            places = {0: self._enter, rule.first_blocks: self._leave}
            handles = [model.watch_stream(place, _weakly(tell)) for place, tell in places.items()]
        else:
            handles = [model.watch_input(_weakly(self._take))]
        for handle in handles:
            weakref.finalize(self, handle.remove)

    def __call__(self, branch: int, run: Callable[[], Tensor]) -> Tensor:
        if branch not in self._reusable:
            return run()
        if self._decided != self.step:
            self._decide()
            self._decided = self.step
        if not any(self._reuse):
            return self._computed(branch, run())
        reused = self._reused(branch)
        return reused if all(self._reuse) else self._computed(branch, run(), reused)

    def stored_bytes(self) -> int:
        return sum(output.nbytes for outputs in self._stored.values() for output in outputs)

    # ---- the signal

    def _enter(self, x: Tensor) -> None:
        self._start = x.clone()  # the stream may change in place

    def _leave(self, x: Tensor) -> None:
        self._signal = x - self._start

    def _take(self, x: Tensor) -> None:
        self._signal = x

    # ---- the decision of a step

    def _decide(self) -> None:
        rule, step = self.rule, self.step
        signal = grouped(self._signal, self._halves if rule.per_sample else None)
        samples, self._signal = len(self._signal) // self._halves, None
        first = self._old is None
        if first:
            self._sums, self._in_a_row = [0.0] * len(signal), [0] * len(signal)
            self._computed_at: list[tuple[int, ...]] = [()] * len(signal)
            changes = [math.inf] * len(signal)
        else:
            changes = relative_change(signal, self._old).tolist()
            if rule.accumulates:
                changes = [total + rule.rescaled(one) for total, one in zip(self._sums, changes, strict=True)]
        forced = first or step >= rule.num_steps - rule.warm_up or (rule.last_step and step == 0)
        most = math.inf if rule.most_reused is None else rule.most_reused
        self._reuse = [
            not forced and change < rule.tolerance and reused < most
            for change, reused in zip(changes, self._in_a_row, strict=True)
        ]
        decided = list(zip(self._reuse, changes, self._in_a_row, self._computed_at, strict=True))
        self._sums = [change if reuse else 0.0 for reuse, change, _, _ in decided]
        self._in_a_row = [count + 1 if reuse else 0 for reuse, _, count, _ in decided]
        self._computed_at = [at if reuse else (step, *at[:1]) for reuse, _, _, at in decided]
        self._mask = torch.tensor(self._reuse, device=signal.device) if len(signal) > 1 else None
        if first or rule.accumulates or not any(self._reuse):
            self._old = signal
        elif not all(self._reuse):
            self._old = torch.where(self._mask[:, None], self._old, signal)
        each, forecasts = samples // len(signal), self._set_weights()
        rule.tally.add(step, samples, each * sum(self._reuse), self._reusable, 2 * each * forecasts)

    def _set_weights(self) -> int:
        """The weights of this step's linear forecasts; returns how many decisions make one."""
        self._weights, weights, forecasts = None, [], 0
        for reuse, at in zip(self._reuse, self._computed_at, strict=True):
            ahead = (at[0] - self.step) / (at[1] - at[0]) if len(at) > 1 else 0.0
            weights.append((1 + ahead, -ahead))
            forecasts += reuse and len(at) > 1
        if self.rule.forecast and forecasts:
            alike = len(set(weights)) == 1
            table = torch.tensor(weights, dtype=torch.float64)
            self._weights = weights[0] if alike else table.to(self._old.device).unbind(1)
        return forecasts if self.rule.forecast else 0

    # ---- the outputs

    def _computed(self, branch: int, output: Tensor, reused: Tensor | None = None) -> Tensor:
        """The output for the samples that compute, `reused` for the others; stores what is new."""
        stored = self._stored.get(branch, ())
        new = output if self._dtype is None else output.to(self._dtype)
        moved = (new, *stored)[: 2 if self.rule.forecast else 1]
        self._output_dtype = output.dtype
        if reused is None:
            self._stored[branch] = moved
            return output
        mask = self._rows(self._mask, output)
        kept = [torch.where(mask, old, one) for old, one in zip(stored, moved, strict=False)]
        self._stored[branch] = (*kept, *moved[len(stored) :])
        return torch.where(mask, reused, output)

    def _reused(self, branch: int) -> Tensor:
        stored = self._stored[branch]
        if self._dtype is not None:
            stored = tuple(output.to(self._output_dtype) for output in stored)
        if self._weights is None:
            return stored[0]
        if isinstance(self._weights[0], float):
            return combined(stored, self._weights)
        dtype = torch.promote_types(stored[0].dtype, torch.float32)
        products = [
            (one * self._rows(weight.to(dtype), one)).to(one.dtype)
            for one, weight in zip(stored, self._weights, strict=False)
        ]
        return sum(products[1:], products[0])

    def _rows(self, values: Tensor, output: Tensor) -> Tensor:
        """One value (n,) for each sample, shaped for a product with a branch output (rows, ..., D)."""
        return values.repeat(len(output) // len(values)).view(-1, *[1] * (output.ndim - 1))


def grouped(signal: Tensor, halves: int | None) -> Tensor:
    """(rows, ..., D) as (n, values), a row for each sample and its `halves`; None: (1, values)."""
    signal = signal.to(torch.promote_types(signal.dtype, torch.float32))
    if halves is None:
        return signal.reshape(1, -1)
    return signal.reshape(halves, len(signal) // halves, -1).transpose(0, 1).flatten(1)


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """(n,) `mean |new - old| / mean |old|` of each row (n, values)."""
    return (new - old).abs().mean(1) / old.abs().mean(1)


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A bound method that does not keep its object alive: the hooks of a policy go with it."""
    reference = weakref.WeakMethod(method)

    def tell(x: Tensor) -> None:
        if (alive := reference()) is not None:
            alive(x)

    return tell
