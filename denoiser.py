"""One denoising step of a guided model, as every loop of this project takes it."""

import torch
from torch import Tensor

from diffusion import GaussianDiffusion
from models import DiT


class Denoiser:
    """Model, chain, labels and guidance scale as one function of (x_t, step, cache).

    labels: (n,). With guidance the batch is [cond; uncond], both halves starting from the same noise; a
    `cfg_scale` of 1 turns guidance off and the batch is n. The state x_t keeps its own
    dtype, whatever the model's.
    """

    def __init__(self, model: DiT, diffusion: GaussianDiffusion, labels: Tensor, cfg_scale: float):
        self.model, self.diffusion, self.cfg_scale = model, diffusion, cfg_scale
        self.guided = cfg_scale != 1.0
        if self.guided and not model.has_null_label:
            raise ValueError(
                f"guidance {cfg_scale:g} needs a null label, this model was built without; use 1 (off)"
            )
        null = torch.full_like(labels, model.num_classes)
        self.y = torch.cat([labels, null]) if self.guided else labels
        self.dtype = next(model.parameters()).dtype

    def start(self, noise: Tensor) -> Tensor:
        """The first x_t from noise (n, C, H, W): (2n, C, H, W) under guidance."""
        return torch.cat([noise, noise]) if self.guided else noise

    def __call__(self, x_t: Tensor, step: int, cache=None) -> Tensor:
        """The model's output (N, 2C, H, W) at `step`; tells `cache` the step."""
        if cache is not None:
            cache.step = step
        t = self.diffusion.timesteps(step, len(x_t), x_t.device)
        x = x_t.to(self.dtype)
        if self.guided:
            return self.model.forward_with_cfg(x, t, self.y, self.cfg_scale, cache).to(x_t.dtype)
        return self.model(x, t, self.y, cache).to(x_t.dtype)
