"""PixArt (Chen et al. 2023, 2024) as a backbone: conditioning on prompts and sizes; random models."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from backbones.pixart_models import PIXART, T5_CHANNELS
from backbones.prompts import Prompts
from backbones.text_transformer import Condition, TextTransformer


class PixArt(TextTransformer):
    """diffusers' `PixArtTransformer2DModel` as a backbone. alpha-1024 is also given the image's size."""

    def _condition(self, numbers: list[int]) -> Condition:
        condition = super()._condition(numbers)
        condition = condition._replace(mask=condition.mask.to(self.dtype))
        if not self.transformer.config.use_additional_conditions:
            return condition
        size = torch.tensor([[self.height, self.width]] * len(numbers), dtype=torch.float32)
        ratio = torch.tensor([[self.height / self.width]] * len(numbers))
        return condition._replace(resolution=size.to(self.device), aspect_ratio=ratio.to(self.device))

    def _arguments(self, x: Tensor, timestep: Tensor, condition: Condition) -> dict[str, Any]:
        added = {"resolution": condition.resolution, "aspect_ratio": condition.aspect_ratio}
        return super()._arguments(x, timestep, condition) | {"added_cond_kwargs": added}


def random_pixart(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of `PIXART` with seeded random weights, layers that start at zero included; no download."""
    from diffusers import PixArtTransformer2DModel  # slow to import

    return with_random_weights(lambda: PixArtTransformer2DModel(**PIXART[name].config(**changes)), seed)


def with_random_weights(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The transformer that `make` makes, its weights seeded, layers that start at zero included; frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = make()
        with torch.no_grad():
            for parameter in transformer.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.02)
    return transformer.eval().requires_grad_(False)


def random_prompts(
    count: int, num_tokens: int, channels: int = T5_CHANNELS, seed: int = 0, pooled: int | None = None
) -> Prompts:
    """Embeddings that no text stands for: for speed, and tests, without an encoder.

    pooled: channels of a vector for each prompt; None: there is none.
    """
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count + 1, num_tokens, channels, generator=generator).half().numpy()
    lengths = torch.randint(4, num_tokens + 1, (count + 1,), generator=generator).int().numpy()
    if pooled is None:
        return Prompts(states, lengths)
    vectors = torch.randn(count + 1, pooled, generator=generator).half().numpy()
    return Prompts(states, lengths, pooled=vectors)
