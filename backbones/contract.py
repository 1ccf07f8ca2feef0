"""The contract of a backbone: a frozen denoising model, whatever it is built of.

Every loop of the program (sampling, training, calibration, benchmark) knows a model by these members alone.
`models.DiT` has them. Another model is one class with the same members; it may wrap modules of a library and
reach their branches through hooks.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Cache = Callable[[int, Callable[[], Tensor]], Tensor]


class Backbone(Protocol):
    """N below is the batch of one forward pass: n samples, under guidance 2n, both halves."""

    branches: tuple[str, ...]  # names in order of execution, BLOCK.KIND
    branch_macs: tuple[int, ...]  # multiply-accumulates of each branch for one sample
    other_macs: int  # those of everything that is never cached
    branch_size: int  # values of a branch output of one sample
    sample_shape: tuple[int, ...]  # of x without its batch, (C, H, W)
    num_classes: int  # conditions to draw from: labels, or prompts by their number
    has_null_label: bool  # whether it can be guided
    prepared_size: int  # values that `prepare` makes for one step and sample
    learn_sigma: bool  # whether an output (N, 2C, H, W) holds a variance beside the noise

    @property
    def num_branches(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def frozen(self) -> bool:
        """Whether no parameter requires a gradient."""

    def condition(self, labels: Tensor, guided: bool) -> Any:
        """What a batch is conditioned on, of labels (n,); under guidance both halves."""

    def embed_timesteps(self, timesteps: Tensor) -> Tensor:
        """What depends on the timestep alone: (S,) of all steps to (S, ...)."""

    def prepare(
        self, embedded: Tensor, condition: Any, computed: Sequence[Sequence[bool]] | None = None
    ) -> list[Any]:
        """For each of some embedded timesteps (S, ...) what `predict` needs that does not depend on x.

        computed: for every step a row of num_branches, whether the branch is computed there; None: all are.
        """

    def predict(self, x: Tensor, prepared: Any, cache: Cache | None = None) -> Tensor:
        """The model's output at x (N, C, H, W).

        Every branch asks `cache(index, run)` for its output, where `run()` computes it.
        """

    def guide(self, output: Tensor, cfg_scale: float) -> Tensor:
        """The guided output of an output for both halves, of the same shape."""

    def predicted_noise(self, output: Tensor) -> Tensor:
        """The channels of an output that a deterministic sampler reads: without those of a variance."""

    @property
    def branch_modules(self) -> list[nn.Module]:
        """The module that holds each branch's linear layers, one per branch."""

    def wrap_branches(self, wrap: Callable[[Callable], Callable]) -> None:
        """Replace every function that computes a branch output by `wrap` of it."""

    def wrap_additions(self, wrap: Callable[[Callable], Callable]) -> None:
        """Replace every function that adds a branch output to the residual stream by `wrap` of it."""
