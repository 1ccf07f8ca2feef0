"""A diffusers transformer as a `Backbone`: what every family shares.

The branches are reached through `hooks.Hooks`: the policy that `predict` is called with answers in them. A
family says what its forward takes and how guidance combines the halves of a batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from backbones.contract import Cache
from backbones.hooks import Hooks, check_supported
from backbones.macs import count_macs
from backbones.stream import first_input, watch_stream


class HookedTransformer(ABC):
    """A frozen transformer of `families.FAMILIES` with one cache hook per branch.

    sample_shape: of x without its batch. factor: pixels per latent and side. patch_size: latents a side of a
    token. The parameters keep their dtype and device; x, samplers and guidance stay in float32.
    """

    embeds_guidance = False

    def __init__(self, transformer: nn.Module, sample_shape: tuple[int, ...], factor: int, patch_size: int):
        check_supported(transformer)
        self.transformer, self.sample_shape = transformer.eval(), sample_shape
        self.input_size, self.vae_factor = sample_shape[-1], factor
        self.in_channels, self.patch_size = sample_shape[0], patch_size
        config = transformer.config
        self.learn_sigma = config.get("out_channels") == 2 * config.in_channels
        self.hooks = Hooks(transformer)
        self.branches = tuple(branch.name for branch in self.hooks.branches)
        with torch.no_grad():
            example = self._arguments(torch.zeros(1, *sample_shape), torch.zeros(()), self._example())
        self.branch_macs, self.other_macs = count_macs(transformer, example)
        self.prepared_size = 1  # nothing of size is made ahead
        self.source, self.predicts, self.conditions = "", "noise", ""

    def close(self) -> None:
        """Take the hooks away; the transformer is as it was before."""
        self.hooks.remove()

    # ---- what a family says

    num_classes: int
    has_null_label: bool
    branch_size: int

    @abstractmethod
    def condition(self, labels: Tensor, guided: bool) -> Any:
        """What a batch is conditioned on, of prompts by number (n,); under guidance of both halves."""

    @abstractmethod
    def _example(self) -> Any:
        """A condition for one sample, for counting MACs."""

    @abstractmethod
    def _arguments(self, x: Tensor, timestep: Tensor, condition: Any) -> dict[str, Any]:
        """The transformer's keyword arguments for x (N, C, H, W) at one timestep."""

    def _output(self, output: Tensor) -> Tensor:
        """The forward's output in the shape of x, but for its channels."""
        return output

    # ---- the contract

    def watch_stream(self, block: int, tell: Callable[[Tensor], None]) -> RemovableHandle:
        blocks = list(dict.fromkeys(branch.block for branch in self.hooks.branches))
        return watch_stream(blocks, block, tell)

    def watch_input(self, tell: Callable[[Tensor], None]) -> RemovableHandle:
        # The blocks modulate in front of the module, and the policy answers within it.
        first = self.hooks.modules[0]
        return first.register_forward_pre_hook(
            lambda _, args, kwargs: tell(first_input(args, kwargs)), with_kwargs=True
        )

    @property
    def num_branches(self) -> int:
        return len(self.branches)

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype  # that of most modules: some classes keep a few in float32

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.transformer.parameters())

    @property
    def branch_modules(self) -> list[nn.Module]:
        return list(self.hooks.modules)

    def parameters(self):
        return self.transformer.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.transformer.state_dict()

    def wrap_branches(self, wrap: Callable[[Callable], Callable]) -> None:
        self.hooks.wrap(wrap)

    def wrap_additions(self, _wrap: Callable[[Callable], Callable]) -> None:
        """Nothing to do: the residual sums are in the library's blocks."""
        return

    def use_kernels(self, *_kernels: Callable | None) -> None:
        """Nothing to do: kernels of ours would have to take the place of the library's modules."""
        return

    def embed_timesteps(self, timesteps: Tensor) -> Tensor:
        """(S,): the transformer embeds them itself."""
        return timesteps

    def prepare(
        self, embedded: Tensor, condition: Any, computed: Sequence[Sequence[bool]] | None = None
    ) -> list[Any]:
        rows = [None] * len(embedded) if computed is None else computed
        return [(timestep, condition, row) for timestep, row in zip(embedded.unbind(), rows, strict=True)]

    def predict(self, x: Tensor, prepared: Any, cache: Cache | None = None) -> Tensor:
        timestep, condition, computed = prepared
        hooks = self.hooks
        hooks.check_gradients()
        hooks.policy, hooks.computing = cache, None if cache is None or computed is None else list(computed)
        try:
            output = self.transformer(**self._arguments(x, timestep, condition), return_dict=False)[0]
        finally:
            hooks.policy = hooks.computing = None
        return self._output(output)

    def guide(self, output: Tensor, cfg_scale: float, channels: int | None = None) -> Tensor:
        """The halves are [unconditional; conditional], as in diffusers' pipelines. channels: None is all."""
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        channels = min(channels or self.sample_shape[0], self.sample_shape[0])
        uncond, cond = output[:, :channels].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), output[:, channels:]], dim=1)

    def predicted_noise(self, output: Tensor) -> Tensor:
        return output[:, : self.sample_shape[0]]
