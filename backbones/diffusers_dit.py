"""diffusers' `DiTTransformer2DModel` as a backbone: the same function as our DiT, from another library.

Two of its constants differ from the official model's: the spacing of timestep frequencies, and a norm's
epsilon. `as_official` sets them as the official weights were trained with.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backbones.hooked import HookedTransformer
from backbones.pixart_models import VAE_FACTOR


class Labels(NamedTuple):
    """Class labels (N,) of a batch, null ones included."""

    labels: Tensor


class DiffusersDiT(HookedTransformer):
    """Class-conditional; under guidance a batch is [conditional; unconditional], guided in three channels."""

    has_null_label = True

    def __init__(self, transformer: nn.Module, factor: int = VAE_FACTOR):
        config = transformer.config
        self.num_classes = config.num_embeds_ada_norm
        tokens = (config.sample_size // config.patch_size) ** 2
        self.branch_size = tokens * config.num_attention_heads * config.attention_head_dim
        shape = (config.in_channels, config.sample_size, config.sample_size)
        super().__init__(transformer, shape, factor, config.patch_size)

    def condition(self, labels: Tensor, guided: bool) -> Labels:
        if not guided:
            return Labels(labels)
        return Labels(torch.cat([labels, torch.full_like(labels, self.num_classes)]))

    def _example(self) -> Labels:
        return Labels(torch.zeros(1, dtype=torch.long))

    def _arguments(self, x: Tensor, timestep: Tensor, condition: Labels) -> dict[str, Any]:
        return {"hidden_states": x, "timestep": timestep.expand(len(x)), "class_labels": condition.labels}

    def guide(self, output: Tensor, cfg_scale: float, channels: int = 3) -> Tensor:
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        cond, uncond = output[:, :channels].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), output[:, channels:]], dim=1)


def as_official(transformer: nn.Module) -> nn.Module:
    """Set the two constants in place to those that the official DiT was trained with; returns the model."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return transformer
