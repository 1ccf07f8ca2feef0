"""The layers of a vision transformer, with the parameter names of the official checkpoints, which are timm's.

timm itself is not needed for these three, and importing it takes longer than importing torch. Letters as in
`models`: N batch, C channels, H, W input size, T tokens, D width.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """One token per patch: a linear map of its pixels, written as a convolution."""

    def __init__(self, input_size: int, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.input_size = input_size
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, T, D). Raises ValueError where H or W is not `input_size`."""
        size = self.input_size
        if x.shape[-2:] != (size, size):
            raise ValueError(f"the input is {x.shape[-2]} x {x.shape[-1]}; the model takes {size} x {size}")
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention of several heads."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        heads = self.qkv(x).reshape(n, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # (N, heads, T, D / heads) each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width))  # (N, T, D)


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, hidden: int, activation: Callable[[], nn.Module] = nn.GELU):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = activation()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # (N, T, D)
