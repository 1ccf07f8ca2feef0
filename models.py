"""The Diffusion Transformer (DiT) family, with one cache hook per branch.

Architecture of Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), with the parameter
names of the official checkpoints. Nothing here knows how caching works: each residual sub-layer (a *branch*)
hands its index and a function that computes its output to `cache`, and adds what `cache` returns. Without a
cache every branch is computed.

Letters in the shape comments: N batch (cond and uncond together under guidance), C channels, H, W input size,
P patch size, T tokens = (H/P) * (W/P), D hidden size, S steps.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from backbones.contract import Cache
from backbones.stream import watch_stream
from common import registry


def compute_always(_branch: int, run: Callable[[], Tensor]) -> Tensor:
    """The cache policy of the plain model: every branch is computed, nothing is stored."""
    return run()


class Modulation(NamedTuple):
    """The conditioning of one branch; every field is (N, 1, D).

    shift and scale (its 1 added) change the branch's input, gate its output. A branch that is not computed
    needs its gate alone: shift and scale are None.
    """

    shift: Tensor | None
    scale: Tensor | None
    gate: Tensor


class Modulations(NamedTuple):
    """All that one evaluation of the model needs from its timestep and labels."""

    branches: list[Modulation]
    final: tuple[Tensor, Tensor]  # shift and scale (N, 1, D)


def modulated(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The input of a branch: x (N, T, D) normalised, then scaled and shifted by (N, 1, D)."""
    return torch.addcmul(shift, norm(x), scale)


def add_gated(x: Tensor, gate: Tensor, output: Tensor) -> Tensor:
    """The residual stream x (N, T, D) plus gate (N, 1, D) times output; in place without gradients."""
    if torch.is_grad_enabled():
        return torch.addcmul(x, gate, output)
    return x.addcmul_(gate, output)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep, then a two-layer MLP."""

    def __init__(self, hidden_size: int, num_frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.num_frequencies = num_frequencies

    def forward(self, t: Tensor) -> Tensor:
        half = self.num_frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t[:, None].float() * torch.exp(-math.log(10000) * exponents)  # (N, half)
        features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)  # (N, num_frequencies)
        return self.mlp(features.to(self.mlp[0].weight.dtype))  # (N, D)


class LabelEmbedder(nn.Module):
    """Class embeddings; with label dropout there is one more row, the null label `num_classes`."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
            y = torch.where(dropped, self.num_classes, y)
        return self.embedding_table(y)  # (N, D)


class DiTBlock(nn.Module):
    """Self-attention and MLP, each modulated and gated by the conditioning (adaLN-Zero)."""

    branches = ("attn", "mlp")

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, index: int):
        super().__init__()
        from timm.layers import Mlp  # slow to import
        from timm.models.vision_transformer import Attention

        self.branch_indices = self.attn_branch, self.mlp_branch = 2 * index, 2 * index + 1
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        gelu = partial(nn.GELU, approximate="tanh")
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=gelu, drop=0)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.modulated, self.add_gated = modulated, add_gated  # `DiT.use_kernels` replaces them

    def forward(self, x: Tensor, attn: Modulation, mlp: Modulation, cache: Cache | None = None) -> Tensor:
        cache = cache or compute_always
        output = cache(self.attn_branch, partial(self.attend, x, attn))  # (N, T, D)
        x = self.add_gated(x, attn.gate, output)  # (N, T, D)
        output = cache(self.mlp_branch, partial(self.transform, x, mlp))  # (N, T, D)
        return self.add_gated(x, mlp.gate, output)  # (N, T, D)

    def attend(self, x: Tensor, modulation: Modulation) -> Tensor:
        return self.attn(self.modulated(self.norm1, x, modulation.shift, modulation.scale))  # (N, T, D)

    def transform(self, x: Tensor, modulation: Modulation) -> Tensor:
        return self.mlp(self.modulated(self.norm2, x, modulation.shift, modulation.scale))  # (N, T, D)

    # The layer `adaLN_modulation` makes (shift, scale, gate) of attn, then of mlp. Gates are made apart from
    # the modulations of inputs: a branch needs its gate at every step, and the others only where it is
    # computed.

    def gates(self, c: Tensor, branch: int) -> Tensor:
        """The gates (S, N, 1, D) of a branch's output at each of S steps. c: (S, N, D), after its SiLU."""
        weight, bias = (one.chunk(6)[3 * branch + 2] for one in self._modulation_layer())
        return F.linear(c, weight, bias).unsqueeze(2)

    def input_modulations(self, c: Tensor, branch: int) -> list[tuple[Tensor, Tensor]]:
        """Shift and scale (its 1 added) of a branch's input at each of S steps, (N, 1, D) both."""
        weight, bias = (one.chunk(2)[branch] for one in self._modulation_layer())
        size = 2 * c.shape[-1]
        shift, scale = F.linear(c, weight[:size], bias[:size]).unsqueeze(2).chunk(2, dim=-1)
        return list(zip(shift, 1 + scale, strict=True))

    def _modulation_layer(self) -> tuple[Tensor, Tensor]:
        return self.adaLN_modulation[1].weight, self.adaLN_modulation[1].bias


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def modulations(self, c: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Shift and scale (its 1 added) at each of S steps, (N, 1, D) both. c: (S, N, D), after its SiLU."""
        shift, scale = self.adaLN_modulation[1](c).unsqueeze(2).chunk(2, dim=-1)
        return list(zip(shift, 1 + scale, strict=True))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.linear(torch.addcmul(shift, self.norm_final(x), scale))  # (N, T, P * P * C_out)


class DiT(nn.Module):
    """Class-conditional diffusion transformer.

    It is a `backbones.contract.Backbone`, which tells what `branches`, `branch_macs`, `other_macs`,
    `branch_size` and `prepared_size` are. Two members more: `vae_factor`, pixels per latent and side (1 for a
    model of pixels), and `source`, a line on where the weights came from.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        from timm.layers import PatchEmbed  # slow to import

        if input_size % patch_size:
            raise ValueError(
                f"input_size {input_size} is not a multiple of patch_size {patch_size}; choose one that is"
            )
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}; choose one that is"
            )
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.num_classes, self.has_null_label = num_classes, class_dropout_prob > 0
        self.learn_sigma, self.predicts, self.conditions = learn_sigma, "noise", ""
        self.embeds_guidance = False
        self.vae_factor, self.source = 8 if in_channels > 3 else 1, ""

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        grid_size = input_size // patch_size
        self.pos_embed = nn.Parameter(
            sincos_pos_embed(hidden_size, grid_size), requires_grad=False
        )  # (1, T, D)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio, i) for i in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

        self.branches = tuple(f"{i}.{name}" for i in range(depth) for name in DiTBlock.branches)
        n, d = grid_size**2, hidden_size
        self.branch_size, self.prepared_size = n * d, (6 * depth + 2) * d
        self.sample_shape = (in_channels, input_size, input_size)
        attn_macs = 4 * n * d**2 + 2 * n**2 * d  # qkv and proj, then the two products of the attention
        mlp_macs = 2 * n * d * int(d * mlp_ratio)
        self.branch_macs = (attn_macs, mlp_macs) * depth
        patch_values = patch_size**2
        embed_macs = n * patch_values * in_channels * d + (self.t_embedder.num_frequencies + d) * d
        self.other_macs = embed_macs + self.prepared_size * d + n * d * patch_values * self.out_channels

    @property
    def num_branches(self) -> int:
        return len(self.branches)

    def initialize_weights(self) -> None:
        """Official initialization: Xavier for linear layers, zero for gates, modulations and the output."""

        def xavier(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        self.apply(xavier)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        zeroed = [block.adaLN_modulation[1] for block in self.blocks]
        for linear in [*zeroed, self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, cache: Cache | None = None) -> Tensor:
        """Predict noise and, with `learn_sigma`, the variance interpolation.

        x: (N, C, H, W) noisy input; t: (N,) timesteps of the 1000-step chain; y: (N,) labels, `num_classes`
        is the null label. Returns (N, 2C, H, W), or (N, C, H, W) without `learn_sigma`.
        """
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        (modulations,) = self.modulations(c.unsqueeze(0))
        return self.predict(x, modulations, cache)  # (N, C_out, H, W)

    def predict(self, x: Tensor, modulations: Modulations, cache: Cache | None = None) -> Tensor:
        """The output (N, C_out, H, W) at x (N, C, H, W), for the timesteps and labels of `modulations`."""
        # The convolution leaves the tokens innermost in memory; norms are faster with the width there.
        x = self.x_embedder(x).contiguous() + self.pos_embed  # (N, T, D)
        for i, block in enumerate(self.blocks):
            x = block(x, *modulations.branches[2 * i : 2 * i + 2], cache)  # (N, T, D)
        return self.unpatchify(self.final_layer(x, *modulations.final))  # (N, C_out, H, W)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(N, T, P * P * C) -> (N, C, H, W)."""
        grid, p, c = self.input_size // self.patch_size, self.patch_size, self.out_channels
        x = x.reshape(-1, grid, grid, p, p, c).permute(0, 5, 1, 3, 2, 4)  # (N, C, grid, P, grid, P)
        return x.reshape(-1, c, self.input_size, self.input_size)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cache: Cache | None = None
    ) -> Tensor:
        """Classifier-free guidance on a batch [cond; uncond]; both halves take the first half of x."""
        half = x[: len(x) // 2]
        return self.guide(self.forward(torch.cat([half, half]), t, y, cache), cfg_scale)

    def guide(self, out: Tensor, cfg_scale: float, channels: int = 3) -> Tensor:
        """The guided output (N, C_out, H, W) of an output [cond; uncond] (N, C_out, H, W).

        As in the official model, guidance is applied to the first three channels (all of eps where there are
        fewer); the other channels keep their own half's output.
        """
        out = out.to(torch.promote_types(out.dtype, torch.float32))  # guidance would amplify bf16's rounding
        guided_channels = min(channels, self.in_channels)
        cond, uncond = out[:, :guided_channels].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)  # (N/2, guided_channels, H, W)
        return torch.cat([torch.cat([guided, guided]), out[:, guided_channels:]], dim=1)

    # ---- what a sampler makes for many steps at once ------------------------------------------------

    def modulations(self, c: Tensor, computed: Sequence[Sequence[bool]] | None = None) -> list[Modulations]:
        """For `predict`: the modulations of S evaluations, from their conditioning c (S, N, D).

        They do not depend on x. A sampler makes them for many steps at once, in a few large matrix products.
        computed: bools (S, num_branches), whether a branch is computed at a step; where it is not, only its
        gate is made. None: all branches are computed.
        """
        c, steps = F.silu(c), range(len(c))
        branches: list[list[Modulation]] = [[] for _ in steps]
        for block in self.blocks:
            for branch, index in enumerate(block.branch_indices):
                chosen = [step for step in steps if computed is None or computed[step][index]]
                inputs = dict.fromkeys(steps, (None, None))
                if chosen:
                    own = c if len(chosen) == len(c) else torch.stack([c[step] for step in chosen])
                    inputs |= zip(chosen, block.input_modulations(own, branch), strict=True)
                for step, gate in enumerate(block.gates(c, branch)):
                    branches[step].append(Modulation(*inputs[step], gate))
        finals = self.final_layer.modulations(c)
        return [Modulations(*one) for one in zip(branches, finals, strict=True)]

    # ---- the rest of a backbone's contract ---------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.pos_embed.dtype

    @property
    def device(self) -> torch.device:
        return self.pos_embed.device

    @property
    def frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def condition(self, labels: Tensor, guided: bool) -> Tensor:
        """Labels (n,); under guidance [labels; null labels] (2n,)."""
        if not guided:
            return labels
        return torch.cat([labels, torch.full_like(labels, self.num_classes)])

    def embed_timesteps(self, timesteps: Tensor) -> Tensor:
        """(S,) to (S, D)."""
        return self.t_embedder(timesteps)

    def prepare(
        self, embedded: Tensor, condition: Tensor, computed: Sequence[Sequence[bool]] | None = None
    ) -> list[Modulations]:
        """The modulations of S embedded timesteps (S, D), each with all labels (N,)."""
        c = embedded.unsqueeze(1) + self.y_embedder(condition)  # (S, N, D)
        return self.modulations(c, computed)

    def predicted_noise(self, output: Tensor) -> Tensor:
        return output[:, : self.in_channels]

    # ---- for caches that decide at run time --------------------------------------------------------

    def watch_stream(self, block: int, tell: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `tell` in every forward with the stream (N, T, D) before a block, or after the last one."""
        return watch_stream(self.blocks, block, tell)

    def watch_input(self, tell: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `tell` in every forward with the modulated input (N, T, D) of the first branch."""
        first = self.blocks[0]

        def before(_: nn.Module, args: tuple) -> None:
            x, modulation = args[:2]
            tell(first.modulated(first.norm1, x, modulation.shift, modulation.scale))

        return first.register_forward_pre_hook(before)

    # ---- for `execution`, which changes how things are computed, not what ---------------------------

    @property
    def branch_modules(self) -> list[nn.Module]:
        """The module that holds each branch's linear layers, one per branch."""
        return [module for block in self.blocks for module in (block.attn, block.mlp)]

    def wrap_branches(self, wrap: Callable[[Callable], Callable]) -> None:
        """Replace every function of (x, modulation) that computes a branch output by `wrap` of it."""
        for block in self.blocks:
            block.attend, block.transform = wrap(block.attend), wrap(block.transform)

    def wrap_additions(self, wrap: Callable[[Callable], Callable]) -> None:
        """Replace every function that adds a gated branch output to the residual stream by `wrap` of it."""
        for block in self.blocks:
            block.add_gated = wrap(block.add_gated)

    def use_kernels(self, modulated: Callable, mlp: Callable[[nn.Module], nn.Module] | None = None) -> None:
        """Replace the function `modulated`, and every MLP by `mlp` of it (None: MLPs stay)."""
        for block in self.blocks:
            block.modulated = modulated
            block.mlp = block.mlp if mlp is None else mlp(block.mlp)


def sincos_pos_embed(dim: int, grid_size: int) -> Tensor:
    """Fixed 2D sine-cosine embedding, columns first as in the official model: (1, grid_size**2, dim)."""
    frequencies = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    rows, columns = np.meshgrid(np.arange(grid_size), np.arange(grid_size), indexing="ij")

    def embed(positions: np.ndarray) -> np.ndarray:
        angles = np.outer(positions.reshape(-1), frequencies)  # (T, dim/4)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (T, dim/2)

    return torch.from_numpy(np.concatenate([embed(columns), embed(rows)], axis=1)).float()[None]


_SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}
DiT_models: dict[str, Callable[..., DiT]] = {
    f"DiT-{size}/{patch_size}": partial(
        DiT, patch_size=patch_size, depth=depth, hidden_size=hidden_size, num_heads=num_heads
    )
    for size, (depth, hidden_size, num_heads) in _SIZES.items()
    for patch_size in (2, 4, 8)
}
DiT_models |= {name: partial(DiT, **preset.options) for name, preset in registry.presets().items()}
