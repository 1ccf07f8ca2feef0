"""Tiny seeded transformers of diffusers' real classes, and inputs for them."""

import diffusers
import torch
from torch import Tensor, nn

LATENT, TEXT, TOKENS = 8, 6, 16  # a side, text tokens, image tokens of the packed models


def seeded(name: str, **config) -> nn.Module:
    """A model with random weights everywhere: layers that start at zero would hide what feeds them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(diffusers, name)(**config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.02)
    return model


def pixart(**config) -> nn.Module:
    config = {
        "num_layers": 2,
        "sample_size": LATENT,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
    } | config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return seeded(
        "PixArtTransformer2DModel", cross_attention_dim=width, caption_channels=16, out_channels=8,
        use_additional_conditions=False, **config,
    )  # fmt: skip


def dit(**config) -> nn.Module:
    config = {"num_layers": 2, "sample_size": LATENT, "out_channels": 8} | config
    return seeded("DiTTransformer2DModel", num_attention_heads=4, attention_head_dim=8, **config)


def sd3(**config) -> nn.Module:
    return seeded(
        "SD3Transformer2DModel", sample_size=LATENT, patch_size=2, in_channels=4, out_channels=4,
        num_layers=3, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm", **config,
    )  # fmt: skip


def flux(**config) -> nn.Module:
    return seeded(
        "FluxTransformer2DModel", patch_size=1, in_channels=16, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8], **config,
    )  # fmt: skip


def sana(**config) -> nn.Module:
    return seeded(
        "SanaTransformer2DModel", patch_size=1, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=4, num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=4,
        cross_attention_dim=8, caption_channels=8, sample_size=LATENT, **config,
    )  # fmt: skip


def wan(**config) -> nn.Module:
    return seeded(
        "WanTransformer3DModel", patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12,
        in_channels=4, out_channels=4, text_dim=16, freq_dim=256, ffn_dim=32, num_layers=2,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32, **config,
    )  # fmt: skip


def qwen(**config) -> nn.Module:
    return seeded(
        "QwenImageTransformer2DModel", patch_size=2, in_channels=16, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=3, joint_attention_dim=16, guidance_embeds=False,
        axes_dims_rope=(8, 4, 4), **config,
    )  # fmt: skip


FAMILIES = {"pixart": pixart, "dit": dit, "sd3": sd3, "flux": flux, "sana": sana, "wan": wan, "qwen": qwen}


def inputs(model: nn.Module, timestep: float, seed: int, n: int = 2) -> dict:
    """Arguments of one forward of a model of any family, its noise and text from `seed`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kind = type(model).__name__
    t = torch.full((n,), timestep)
    if kind.startswith("DiT"):
        labels = torch.arange(n)
        return {"hidden_states": draw(n, 4, LATENT, LATENT), "timestep": t.long(), "class_labels": labels}
    if kind.startswith("PixArt"):
        return {
            "hidden_states": draw(n, 4, LATENT, LATENT), "encoder_hidden_states": draw(n, TEXT, 16),
            "timestep": t.long(), "encoder_attention_mask": torch.ones(n, TEXT),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }  # fmt: skip
    if kind.startswith("SD3"):
        return {
            "hidden_states": draw(n, 4, LATENT, LATENT), "encoder_hidden_states": draw(n, TEXT, 32),
            "pooled_projections": draw(n, 16), "timestep": t,
        }  # fmt: skip
    if kind.startswith("Flux"):
        return {
            "hidden_states": draw(n, TOKENS, 16), "encoder_hidden_states": draw(n, TEXT, 32),
            "pooled_projections": draw(n, 32), "timestep": t / 1000, "img_ids": torch.zeros(TOKENS, 3),
            "txt_ids": torch.zeros(TEXT, 3),
        }  # fmt: skip
    if kind.startswith("Sana"):
        states = draw(n, 4, LATENT, LATENT)
        return {"hidden_states": states, "encoder_hidden_states": draw(n, TEXT, 8), "timestep": t}
    if kind.startswith("Wan"):
        states = draw(n, 4, 2, LATENT, LATENT)
        return {"hidden_states": states, "encoder_hidden_states": draw(n, TEXT, 16), "timestep": t}
    return {
        "hidden_states": draw(n, TOKENS, 16), "encoder_hidden_states": draw(n, TEXT, 16),
        "encoder_hidden_states_mask": torch.ones(n, TEXT, dtype=torch.bool), "timestep": t / 1000,
        "img_shapes": [[(1, 4, 4)]] * n,
    }  # fmt: skip
