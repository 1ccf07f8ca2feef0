"""Any text-to-image transformer of diffusers as a backbone: a row of `inputs.INPUTS` says what it takes."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from backbones.hooked import HookedTransformer
from backbones.inputs import INPUTS
from backbones.prompts import Prompts


class Condition(NamedTuple):
    """What a batch is conditioned on; None for what the model does not take.

    Prompts' states (N, L, D), their mask (N, L), a vector each (N, P), the guidance scale (N,), and sizes.
    """

    states: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    guidance: Tensor | None = None
    resolution: Tensor | None = None  # (N, 2) pixels
    aspect_ratio: Tensor | None = None  # (N, 1)


class TextTransformer(HookedTransformer):
    """A transformer of `INPUTS` as a backbone; its labels are numbers of prompts.

    transformer: frozen, in any dtype. prompts: what `labels` count. pixels: those of the images, (H, W) or a
    side; by default what the transformer was trained for. factor: pixels per latent and side. scheduler: the
    config of the pipeline's scheduler, which says how sigmas are spaced; None: the row's. num_frames: those
    of a video. Under guidance a batch is [null prompt; prompt], each with its own mask. Raises
    ValueError for prompts and sizes that do not fit, and for a variant that takes more than a prompt.
    """

    def __init__(
        self,
        transformer: nn.Module,
        prompts: Prompts,
        pixels: int | tuple[int, int] | None = None,
        factor: int | None = None,
        scheduler: Mapping[str, Any] | None = None,
        num_frames: int = 1,
    ):
        config, row = transformer.config, INPUTS[type(transformer).__name__]
        check_variant(transformer)
        if prompts.channels != config[row.states]:
            raise ValueError(
                f"the prompts have {prompts.channels} channels, the transformer takes "
                f"{config[row.states]}; encode them with the text encoder that it was trained with"
            )
        factor = factor or row.factor
        own = factor * (config.get("sample_size") or row.side)
        self.height, self.width = (pixels or own,) * 2 if not isinstance(pixels, tuple) else pixels
        patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[-1]
        self.row, self.side = row, row.packing if row.packing > 1 else patch  # latents a side of a token
        unit = factor * self.side
        if self.height % unit or self.width % unit:
            raise ValueError(f"{self.height} x {self.width} pixels: both must be multiples of {unit}")
        self.prompts, self.num_classes = prompts, len(prompts)
        self.has_null_label = row.null_prompt is not None
        self.embeds_guidance = "guidance" in row.prompts.values() and bool(config.get("guidance_embeds"))
        size = (self.height // factor, self.width // factor)
        self.grid = tuple(one // self.side for one in size)
        frames = _latent_frames(num_frames, row.frames)
        tokens = (frames or 1) * math.prod(self.grid)
        self.branch_size = tokens * config.num_attention_heads * config.attention_head_dim
        self.scheduler = dict(row.scheduler if scheduler is None else scheduler)
        channels = config.in_channels // row.packing**2
        shape = (channels, frames, *size) if frames else (channels, *size)
        self._positions: dict[tuple[int, torch.device], dict[str, Any]] = {}
        super().__init__(transformer, shape, factor, self.side)
        self.predicts = row.predicts
        self.conditions = prompts.key if num_frames == 1 else f"{prompts.key}, {num_frames} frames"

    # ---- conditions

    def condition(self, labels: Tensor, guided: bool) -> Condition:
        numbers = labels.tolist()
        return self._condition([len(self.prompts)] * len(numbers) + numbers if guided else numbers)

    def with_guidance(self, condition: Condition, cfg_scale: float) -> Condition:
        """For a model that embeds the guidance scale: a condition with it."""
        return condition._replace(
            guidance=torch.full((len(condition.states),), cfg_scale, device=self.device)
        )

    def _condition(self, numbers: list[int]) -> Condition:
        states, mask = self.prompts.batch(numbers)
        pooled = self.prompts.pooled_batch(numbers)
        parts = (states.to(self.dtype), mask, pooled if pooled is None else pooled.to(self.dtype))
        return Condition(*(None if part is None else part.to(self.device) for part in parts))

    def _example(self) -> Condition:
        condition = Condition(*(None if part is None else part.cpu() for part in self._condition([0])))
        return condition._replace(guidance=torch.ones(1)) if self.embeds_guidance else condition

    def _arguments(self, x: Tensor, timestep: Tensor, condition: Condition) -> dict[str, Any]:
        row, config = self.row, self.transformer.config
        given = {argument: getattr(condition, part) for argument, part in row.prompts.items()}
        return {
            "hidden_states": self._packed(x),
            "timestep": row.timestep(timestep.expand(len(x)), config),
            **given,
            **self._positions_at(condition.states.shape[1], x.device),
        }

    def _positions_at(self, text: int, device: torch.device) -> dict[str, Any]:
        """The row's positions on a device, made once."""
        if (text, device) not in self._positions:
            made = self.row.positions(self.grid, text)
            self._positions[text, device] = {
                name: one.to(device) if isinstance(one, Tensor) else one for name, one in made.items()
            }
        return self._positions[text, device]

    # ---- tokens and latents

    def _packed(self, x: Tensor) -> Tensor:
        """Latents (N, C, H, W) as the forward takes them: tokens (N, T, p p C) where the pipeline packs."""
        p = self.row.packing
        if p == 1:
            return x
        (rows, columns), channels = self.grid, x.shape[1]
        x = x.reshape(len(x), channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(len(x), rows * columns, channels * p * p)

    def _unpacked(self, tokens: Tensor) -> Tensor:
        """The inverse of `_packed`."""
        p = self.row.packing
        if p == 1:
            return tokens
        rows, columns = self.grid
        x = tokens.reshape(len(tokens), rows, columns, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(len(tokens), -1, rows * p, columns * p)

    def _output(self, output: Tensor) -> Tensor:
        return self._unpacked(output)

    # ---- guidance and noise levels

    def guide(self, output: Tensor, cfg_scale: float, channels: int | None = None) -> Tensor:
        guided = super().guide(output, cfg_scale, channels)
        if not self.row.rescaled:
            return guided
        cond, tokens = self._packed(output.chunk(2)[1].float()), self._packed(guided.chunk(2)[0])
        norms = [torch.norm(one, dim=-1, keepdim=True) for one in (cond, tokens)]
        rescaled = self._unpacked(tokens * (norms[0] / norms[1]))
        return torch.cat([rescaled, rescaled])

    def sigmas(self, num_steps: int) -> list[float]:
        """The noise levels of T steps of flow matching in the order of execution, 0 at the end.

        They are those of the pipeline at this size, by diffusers' own scheduler with its config.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler  # slow to import

        given = self.scheduler
        if "flow_shift" in given:  # a scheduler of another kind, such as UniPC's, with sigmas of a flow
            given = {"shift": given["flow_shift"]}
        known = {name: value for name, value in given.items() if not name.startswith("_")}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(known)
        options = {}
        if self.row.spacing == "even":
            options["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
        if scheduler.config.use_dynamic_shifting:
            options["mu"] = _shift(math.prod(self.grid), scheduler.config)
        scheduler.set_timesteps(num_steps, **options)
        return scheduler.sigmas.tolist()


def _latent_frames(num_frames: int, per_latent: int) -> int:
    """Frames of the latents of a video; 0 for images. Raises ValueError for a number that does not fit."""
    if not per_latent:
        return 0
    if (num_frames - 1) % per_latent:
        raise ValueError(
            f"--num-frames {num_frames}: the number must be one more than a multiple of {per_latent}; try "
            f"{num_frames - (num_frames - 1) % per_latent}"
        )
    return 1 + (num_frames - 1) // per_latent


def _shift(tokens: int, config: Mapping[str, Any]) -> float:
    """The shift of a picture of so many tokens, on the line between the config's two points."""
    first, last = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (last - first)
    return tokens * slope + config["base_shift"] - slope * first


def check_variant(transformer: nn.Module) -> None:
    """Raise ValueError for a model of the class that takes more than latents and a prompt."""
    config, name = transformer.config, type(transformer).__name__
    row = INPUTS[name]
    taken, given = config.in_channels, config.get("out_channels") or config.in_channels
    if row.packing > 1:  # channels of a token, and of what it predicts
        given *= config.patch_size**2
    more = [option for option in _MORE_THAN_A_PROMPT if config.get(option)]
    if config.get("guidance_embeds") and "guidance" not in row.prompts.values():
        more.append("guidance_embeds")
    if given not in (taken, 2 * taken):
        more.insert(0, f"{taken} input channels for {given} of output")
    if more:
        raise ValueError(
            f"this {name} has {more[0]}: it takes more than latents and a prompt, which the commands do not "
            "give; use apply_schedule on its pipeline"
        )


_MORE_THAN_A_PROMPT = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "image_dim")
