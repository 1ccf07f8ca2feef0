"""One denoising step of a guided model, as every loop of this project takes it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion import GaussianDiffusion
from models import DiT, Modulations

MODULATION_BYTES = 2**28  # made ahead at most, by as many steps as fit


class Denoiser:
    """Model, chain, labels and guidance scale as one function of (x_t, step, cache).

    labels: (n,). With guidance the batch is [cond; uncond], both halves starting from the same noise; a
    `cfg_scale` of 1 turns guidance off and the batch is n. The state x_t keeps its own dtype, whatever the
    model's. What depends on step and label alone is computed for many steps at once, and once for all
    trajectories that share a Denoiser. computed: a policy's `computed`, (T, B) bools, where it leaves some
    branches out; None: every branch of every step is wanted.
    """

    def __init__(
        self,
        model: DiT,
        diffusion: GaussianDiffusion,
        labels: Tensor,
        cfg_scale: float,
        computed: Sequence[Sequence[bool]] | None = None,
    ):
        self.model, self.diffusion, self.cfg_scale = model, diffusion, cfg_scale
        self.guided = cfg_scale != 1.0
        if self.guided and not model.has_null_label:
            raise ValueError(
                f"guidance {cfg_scale:g} needs a null label, this model was built without; use 1 (off)"
            )
        null = torch.full_like(labels, model.num_classes)
        self.y = torch.cat([labels, null]) if self.guided else labels
        self.dtype = next(model.parameters()).dtype
        self.computed = computed
        step_bytes = len(self.y) * model.modulation_size * self.dtype.itemsize
        self.chunk_size = min(diffusion.num_timesteps, max(1, MODULATION_BYTES // max(1, step_bytes)))
        self._chunk, self._modulations = -1, []
        self._timesteps: Tensor | None = None  # embedded, (T, D)

    def start(self, noise: Tensor) -> Tensor:
        """The first x_t from noise (n, C, H, W): (2n, C, H, W) under guidance."""
        return torch.cat([noise, noise]) if self.guided else noise

    def __call__(self, x_t: Tensor, step: int, cache=None) -> Tensor:
        """The model's output (N, 2C, H, W) at `step`; tells `cache` the step."""
        if cache is not None:
            cache.step = step
        x = x_t.to(self.dtype)
        if self.guided:
            x = x[: len(x) // 2].repeat(2, 1, 1, 1)  # both halves take the first one's state
        out = self.model.predict(x, self._modulations_at(step), cache)
        return (self.model.guide(out, self.cfg_scale) if self.guided else out).to(x_t.dtype)

    @torch.no_grad()
    def _modulations_at(self, step: int) -> Modulations:
        chunk, offset = divmod(step, self.chunk_size)
        if chunk != self._chunk:
            every = range(self.diffusion.num_timesteps)
            if self._timesteps is None:  # of all at once: fewer would be rounded otherwise
                t = torch.cat([self.diffusion.timesteps(one, 1, self.y.device) for one in every])
                self._timesteps = self.model.t_embedder(t)
            steps = every[chunk * self.chunk_size :][: self.chunk_size]
            c = self._timesteps[steps.start : steps.stop, None] + self.model.y_embedder(self.y)  # (S, N, D)
            computed = None if self.computed is None else [self.computed[one] for one in steps]
            self._modulations = []  # freed before the next ones are made
            self._modulations = self.model.modulations(c, computed)
            self._chunk = chunk
        return self._modulations[offset]
