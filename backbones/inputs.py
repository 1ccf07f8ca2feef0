"""What diffusers' text-to-image transformers take of x, t and prompt, and what they predict: one row a class.

A row is all that a class of `families.FAMILIES` needs to be a value of `--model`. `docs/diffusers.md` says
how to write one and how to check it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, ...]  # tokens of an image or video, one number a side


@dataclass(frozen=True)
class Inputs:
    """A row: what the transformers of one class take.

    prompts: by the names of the forward's arguments, the parts of an encoded prompt that they get: `states`,
    `mask`, `pooled`, and `guidance`, the guidance scale of models that embed it.
    states, pooled: entries of the config that say how many channels these have.
    pipeline: the class of diffusers whose `encode_prompt` makes them; None: T5 alone, see `prompts.py`.
    encoded: what it returns, in its order; "" for what is not needed. options: its arguments beside `prompt`.
    instructed: arguments that the null prompt goes without; others get what the pipeline's call has.
    num_tokens: of an encoded prompt. trimmed: the pipeline fills prompts up to the longest one alone.
    null_prompt: None for a class that is not guided by one.
    predicts: "noise" or "velocity". timestep: what the forward takes of a timestep, 0 .. 1000, by the config.
    packing: side of the squares of latents that the pipeline makes one token of; 1: it packs none.
    positions: further arguments, from the grid of tokens and the number of text tokens.
    spacing: how sigmas are spaced: "scheduler" leaves it to the scheduler, "even" gives it 1 .. 1/T.
    scheduler: its config where a folder has none. rescaled: guidance keeps the norm of each token.
    side: latents a side, where the config does not say it. factor: pixels per latent, where there is no VAE.
    frames: frames of a video per latent frame after the first one, x is (C, F, H, W); 0: x has none.
    """

    prompts: Mapping[str, str]
    states: str
    pooled: str | None = None
    pipeline: str | None = None
    encoded: tuple[str, ...] = ("states",)
    options: Mapping[str, Any] = field(default_factory=dict)
    instructed: tuple[str, ...] = ()
    num_tokens: int = 512
    trimmed: bool = False
    null_prompt: str | None = ""
    predicts: str = "velocity"
    timestep: Callable[[Tensor, Mapping], Tensor] = lambda t, _config: t
    packing: int = 1
    positions: Callable[[Grid, int], dict[str, Any]] = lambda _grid, _text: {}
    spacing: str = "scheduler"
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    rescaled: bool = False
    side: int = 128
    factor: int = 8
    frames: int = 0


def _flux_positions(grid: Grid, text: int) -> dict[str, Tensor]:
    rows, columns = (torch.arange(side, dtype=torch.float32) for side in grid)
    ids = torch.stack(torch.meshgrid(torch.zeros(1), rows, columns, indexing="ij"), dim=-1)
    return {"img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(text, 3)}


INPUTS: dict[str, Inputs] = {
    "PixArtTransformer2DModel": Inputs(
        prompts={"encoder_hidden_states": "states", "encoder_attention_mask": "mask"},
        states="caption_channels",
        num_tokens=120,
        predicts="noise",
    ),
    "SD3Transformer2DModel": Inputs(
        prompts={"encoder_hidden_states": "states", "pooled_projections": "pooled"},
        states="joint_attention_dim",
        pooled="pooled_projection_dim",
        pipeline="StableDiffusion3Pipeline",
        encoded=("states", "", "pooled", ""),
        options={"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False},
        num_tokens=333,  # 77 of CLIP, 256 of T5
        scheduler={"shift": 3.0},
    ),
    # FLUX.1-dev embeds the guidance scale. FLUX.1-schnell takes none.
    "FluxTransformer2DModel": Inputs(
        prompts={
            "encoder_hidden_states": "states", "pooled_projections": "pooled", "guidance": "guidance",
        },
        states="joint_attention_dim",
        pooled="pooled_projection_dim",
        pipeline="FluxPipeline",
        encoded=("states", "pooled", ""),
        options={"prompt_2": None},
        null_prompt=None,
        timestep=lambda t, _config: t / 1000,
        packing=2,
        positions=_flux_positions,
        spacing="even",
        scheduler={"use_dynamic_shifting": True, "shift": 3.0},
    ),
    "SanaTransformer2DModel": Inputs(
        prompts={"encoder_hidden_states": "states", "encoder_attention_mask": "mask"},
        states="caption_channels",
        pipeline="SanaPipeline",
        encoded=("states", "mask", "", ""),
        options={"do_classifier_free_guidance": False},
        instructed=("complex_human_instruction",),
        num_tokens=300,
        timestep=lambda t, config: t * config.get("timestep_scale", 1.0),
        scheduler={"shift": 3.0},
        side=32,
        factor=32,
    ),
    "QwenImageTransformer2DModel": Inputs(
        prompts={"encoder_hidden_states": "states", "encoder_hidden_states_mask": "mask"},
        states="joint_attention_dim",
        pipeline="QwenImagePipeline",
        encoded=("states", "mask"),
        trimmed=True,
        null_prompt=" ",
        timestep=lambda t, _config: t / 1000,
        packing=2,
        positions=lambda grid, _text: {"img_shapes": [[(1, *grid)]]},
        spacing="even",
        scheduler={"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_image_seq_len": 8192,
                   "max_shift": 0.9},
        rescaled=True,
    ),
    "WanTransformer3DModel": Inputs(
        prompts={"encoder_hidden_states": "states"},
        states="text_dim",
        pipeline="WanPipeline",
        encoded=("states", ""),
        options={"do_classifier_free_guidance": False},
        scheduler={"shift": 3.0},
        side=60,
        frames=4,
    ),
}  # fmt: skip
