"""The contract of a backbone: a frozen denoising model, whatever it is built of.

Every loop of the program (sampling, training, calibration, benchmark) uses only these members of a model.
`models.DiT` has them. Another model is one class with the same members; it may wrap modules of a library and
reach their branches through hooks.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Cache = Callable[[int, Callable[[], Tensor]], Tensor]


class Backbone(Protocol):
    """N below is the batch of one forward pass: n samples, under guidance 2n, both halves."""

    branches: tuple[str, ...]  # names in order of execution, BLOCK.KIND
    branch_macs: tuple[int, ...]  # multiply-accumulates of each branch for one sample
    other_macs: int  # those of everything that is never cached
    branch_size: int  # values of a branch output of one sample
    sample_shape: tuple[int, ...]  # shape of x without its batch, (C, H, W)
    predicts: str  # "noise", or "velocity" where it was trained by flow matching
    num_classes: int  # conditions to draw from: labels, or prompts by their number
    conditions: str  # what tells one set of prompts from another; "" where conditions are class labels
    has_null_label: bool  # whether it can be guided
    embeds_guidance: bool  # optional; whether the guidance scale is an input: then no halves are combined
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
        """The conditions of a batch with labels (n,); under guidance those of both halves."""

    def with_guidance(self, condition: Any, cfg_scale: float) -> Any:
        """Optional, where `embeds_guidance`: the conditions with the guidance scale."""

    def sigmas(self, num_steps: int) -> list[float]:
        """Optional, where it predicts velocity: the noise levels of T steps, T + 1 values from 1 to 0."""

    def embed_timesteps(self, timesteps: Tensor) -> Tensor:
        """Embeddings (S, ...) of the timesteps (S,) of all steps: all that depends on the timestep alone."""

    def prepare(
        self, embedded: Tensor, condition: Any, computed: Sequence[Sequence[bool]] | None = None
    ) -> list[Any]:
        """All that `predict` needs and that does not depend on x, for each of S embedded timesteps (S, ...).

        computed: bools (S, num_branches), whether a branch is computed at a step; None: all are.
        """

    def predict(self, x: Tensor, prepared: Any, cache: Cache | None = None) -> Tensor:
        """The model's output at x (N, C, H, W).

        Every branch asks `cache(index, run)` for its output, where `run()` computes it.
        """

    def guide(self, output: Tensor, cfg_scale: float, channels: int = ...) -> Tensor:
        """The guided output, from an output for both halves; the shape stays.

        channels: how many channels guidance reaches; a backbone has a default.
        """

    def predicted_noise(self, output: Tensor) -> Tensor:
        """The channels of an output that predict the noise, without those of a variance."""

    def watch_stream(self, block: int, tell: Callable[[Tensor], None]) -> RemovableHandle:
        """Optional, for caches that decide at run time: call `tell` with the residual stream (N, ..., D).

        In every forward before a block by its number, or after the last one. The stream may change in place.
        """

    def watch_input(self, tell: Callable[[Tensor], None]) -> RemovableHandle:
        """Optional, likewise: call `tell` with the first branch's modulated input, before its policy."""

    @property
    def branch_modules(self) -> list[nn.Module]:
        """The module that holds each branch's linear layers, one per branch."""

    def wrap_branches(self, wrap: Callable[[Callable], Callable]) -> None:
        """Replace every function that computes a branch output by `wrap` of it."""

    def wrap_additions(self, wrap: Callable[[Callable], Callable]) -> None:
        """Replace every function that adds a branch output to the residual stream by `wrap` of it."""
