"""The published PixArt models: what each was trained for, and where it lies on the Hub.

| name | pixels | caption tokens | Hub id of the transformer |
|---|---|---|---|
| `PixArt-alpha-256`, `-512`, `-1024` | 256, 512, 1024 | 120 | PixArt-alpha/PixArt-XL-2-... |
| `PixArt-Sigma-256`, `-512`, `-1024`, `-2048` | 256 to 2048 | 300 | PixArt-alpha/PixArt-Sigma-XL-2-... |

All have 28 blocks of three branches (self-attention, cross-attention, feed-forward), 84 in all. alpha-1024 is
also conditioned on the image's size and aspect ratio.
"""

from dataclasses import dataclass
from typing import Any

T5_CHANNELS = 4096
VAE_FACTOR = 8
# Numbers of parameters, counted on models of the known configs.
VAE_PARAMETERS, T5_PARAMETERS = 83_653_863, 4_762_310_656
_PARAMETERS, _MICRO_CONDITIONS = 610_856_096, 493_056
ALPHA_PIPELINE, SIGMA_PIPELINE = (
    "PixArt-alpha/PixArt-XL-2-1024-MS",
    "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
)


@dataclass(frozen=True)
class PixArtModel:
    """A published model.

    hub: id of the repository with its transformer; parts: of the pipeline with its VAE, T5 and tokenizer.
    """

    pixels: int
    num_tokens: int
    interpolation_scale: float
    micro_conditions: bool
    hub: str
    parts: str

    @property
    def parameters(self) -> int:
        """Number of parameters of the transformer."""
        return _PARAMETERS + (_MICRO_CONDITIONS if self.micro_conditions else 0)

    def config(self, **changes: Any) -> dict[str, Any]:
        """The arguments of diffusers' `PixArtTransformer2DModel`. changes: such as num_layers=4."""
        return {
            "num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "in_channels": 4,
            "out_channels": 8, "cross_attention_dim": 1152, "attention_bias": True,
            "sample_size": self.pixels // VAE_FACTOR, "patch_size": 2, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": T5_CHANNELS,
            "interpolation_scale": self.interpolation_scale,
            "use_additional_conditions": self.micro_conditions,
        } | changes  # fmt: skip


_ALPHA, _SIGMA = "PixArt-alpha/PixArt-XL-2-", "PixArt-alpha/PixArt-Sigma-XL-2-"
PIXART: dict[str, PixArtModel] = {
    "PixArt-alpha-256": PixArtModel(256, 120, 1.0, False, f"{_ALPHA}256x256", ALPHA_PIPELINE),
    "PixArt-alpha-512": PixArtModel(512, 120, 1.0, False, f"{_ALPHA}512x512", ALPHA_PIPELINE),
    "PixArt-alpha-1024": PixArtModel(1024, 120, 2.0, True, f"{_ALPHA}1024-MS", ALPHA_PIPELINE),
    "PixArt-Sigma-256": PixArtModel(256, 300, 0.5, False, f"{_SIGMA}256x256", SIGMA_PIPELINE),
    "PixArt-Sigma-512": PixArtModel(512, 300, 1.0, False, f"{_SIGMA}512-MS", SIGMA_PIPELINE),
    "PixArt-Sigma-1024": PixArtModel(1024, 300, 2.0, False, f"{_SIGMA}1024-MS", SIGMA_PIPELINE),
    "PixArt-Sigma-2048": PixArtModel(2048, 300, 4.0, False, f"{_SIGMA}2K-MS", SIGMA_PIPELINE),
}
