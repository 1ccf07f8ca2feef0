"""PixArt (Chen et al. 2023, 2024) as a backbone: conditioning on prompts, sizes, guidance."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backbones.hooked import HookedTransformer
from backbones.pixart_models import PIXART, T5_CHANNELS, VAE_FACTOR
from backbones.prompts import Prompts


class Condition(NamedTuple):
    """Caption states (N, L, D) and their mask (N, L); micro-conditions, where the model has them."""

    states: Tensor
    mask: Tensor
    resolution: Tensor | None  # (N, 2) pixels
    aspect_ratio: Tensor | None  # (N, 1)


class PixArt(HookedTransformer):
    """diffusers' `PixArtTransformer2DModel` as a backbone; its labels are numbers of prompts.

    transformer: frozen, in any dtype. prompts: what `labels` count. pixels: those of the images, by default
    what the transformer was trained for; other sides are the multiples of 16. Under guidance a batch is [null
    prompt; prompt], each with its own mask, as in diffusers' pipelines.
    """

    has_null_label = True

    def __init__(self, transformer: nn.Module, prompts: Prompts, pixels: int | tuple[int, int] | None = None):
        config = transformer.config
        if prompts.channels != config.caption_channels:
            raise ValueError(
                f"the prompts have {prompts.channels} channels, the transformer takes "
                f"{config.caption_channels}; encode them with the text encoder that it was trained with"
            )
        own = config.sample_size * VAE_FACTOR
        self.height, self.width = (pixels or own,) * 2 if not isinstance(pixels, tuple) else pixels
        unit = VAE_FACTOR * config.patch_size
        if self.height % unit or self.width % unit:
            raise ValueError(f"{self.height} x {self.width} pixels: both must be multiples of {unit}")
        self.prompts, self.num_classes = prompts, len(prompts)
        side = (self.height // VAE_FACTOR, self.width // VAE_FACTOR)
        tokens = side[0] * side[1] // config.patch_size**2
        self.branch_size = tokens * config.num_attention_heads * config.attention_head_dim
        super().__init__(transformer, (config.in_channels, *side))
        self.conditions = prompts.key

    def condition(self, labels: Tensor, guided: bool) -> Condition:
        numbers = labels.tolist()
        return self._condition([len(self.prompts)] * len(numbers) + numbers if guided else numbers)

    def _condition(self, numbers: list[int]) -> Condition:
        states, mask = self.prompts.batch(numbers)
        resolution = aspect_ratio = None
        if self.transformer.config.use_additional_conditions:
            resolution = torch.tensor([[self.height, self.width]] * len(numbers), dtype=torch.float32)
            aspect_ratio = torch.tensor([[self.height / self.width]] * len(numbers))
        parts = (states.to(self.dtype), mask.to(self.dtype), resolution, aspect_ratio)
        return Condition(*(None if part is None else part.to(self.device) for part in parts))

    def _example(self) -> Condition:
        return Condition(*(None if part is None else part.cpu() for part in self._condition([0])))

    def _arguments(self, x: Tensor, timestep: Tensor, condition: Condition) -> dict[str, Any]:
        added = {"resolution": condition.resolution, "aspect_ratio": condition.aspect_ratio}
        return {
            "hidden_states": x,
            "encoder_hidden_states": condition.states,
            "encoder_attention_mask": condition.mask,
            "timestep": timestep.expand(len(x)),
            "added_cond_kwargs": added,
        }


def random_pixart(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of `PIXART` with seeded random weights, layers that start at zero included; no download."""
    from diffusers import PixArtTransformer2DModel  # slow to import

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = PixArtTransformer2DModel(**PIXART[name].config(**changes))
        with torch.no_grad():
            for parameter in transformer.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.02)
    return transformer.eval().requires_grad_(False)


def random_prompts(count: int, num_tokens: int, channels: int = T5_CHANNELS, seed: int = 0) -> Prompts:
    """Embeddings that no text stands for: for speed, and tests, without an encoder."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count + 1, num_tokens, channels, generator=generator).half().numpy()
    lengths = torch.randint(4, num_tokens + 1, (count + 1,), generator=generator).int().numpy()
    return Prompts(states, lengths)
