"""What a router is trained on: step-wise denoising training (SDT) and the image error proxy (IEPO).

HarmoniCa (Huang et al., ICML 2025), sections 4.2 and 4.3. Pure mathematics: no processes, files or logging.
The training trajectory is a generator that yields after every update; its caller logs, saves and stops.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cache import SoftCache
from denoiser import Denoiser
from diffusion import GaussianDiffusion
from models import DiT
from router import Router

PROXY_DEFINITIONS = ("released", "paper")


class TrainStep(NamedTuple):
    """One update of row `step`; the losses are 0-dim tensors left on the device."""

    step: int
    loss: Tensor
    data_loss: Tensor
    score_sum: Tensor


def train_trajectory(
    model: DiT,
    diffusion: GaussianDiffusion,
    router: Router,
    optimizer: torch.optim.Optimizer,
    noise: Tensor,
    labels: Tensor,
    cfg_scale: float,
    threshold: float,
    proxy_weights: Tensor,
    reg_weight: float,
) -> Iterator[TrainStep]:
    """Step-wise denoising training: one full run from `noise`, one update of row i at every step i < T-1.

    noise: (n, C, H, W); labels: (n,); proxy_weights: (T,) lambda. The model must be frozen and in eval mode.
    Row i's loss is `lambda_i * mean((teacher - routed)^2) + reg_weight * sum_b score[i, b]`, over the whole
    guided output.
    """
    denoise = Denoiser(model, diffusion, labels, cfg_scale)
    first_step = diffusion.num_timesteps - 1
    cache = SoftCache(router.score_rows(), threshold)
    with torch.no_grad():
        x_t = denoise.start(noise)
        x_t = diffusion.ddim_step(denoise(x_t, first_step, cache), x_t, first_step)
    for step in reversed(range(first_step)):
        with torch.no_grad():
            teacher = denoise(x_t, step)
        routed = denoise(x_t, step, cache)
        data_loss = (teacher - routed).square().mean()
        score_sum = cache.scores[step].sum()
        loss = proxy_weights[step] * data_loss + reg_weight * score_sum
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        router.clamp_(step)
        x_t = diffusion.ddim_step(routed.detach(), x_t, step)
        yield TrainStep(step, loss.detach(), data_loss.detach(), score_sum.detach())


@torch.no_grad()
def image_error_proxy(
    model: DiT,
    diffusion: GaussianDiffusion,
    router: Router,
    noise: Tensor,
    labels: Tensor,
    cfg_scale: float,
    threshold: float,
    definition: str = "released",
) -> Tensor:
    """Proxy weights lambda (T,): how much the final image changes with the router's work at each step.

    Mean squared change of x_0 per element, over the whole guided batch, with the soft blend of training.
    `"paper"` (eq. 9) computes step i alone in full where all others are routed; `"released"` switches steps
    to the router one after the other, noisiest first, and takes each one's change. The last entry belongs to
    the first step, never routed: 0.
    Raises ValueError for another `definition`.
    """
    if definition not in PROXY_DEFINITIONS:
        raise ValueError(
            f"proxy definition {definition!r} is unknown; choose one of {', '.join(PROXY_DEFINITIONS)}"
        )
    proxy = _released_proxy if definition == "released" else _paper_proxy
    denoise = Denoiser(model, diffusion, labels, cfg_scale)

    def advance(x_t: Tensor, steps: range, cache: SoftCache | None = None) -> Tensor:
        for step in steps:
            x_t = diffusion.ddim_step(denoise(x_t, step, cache), x_t, step)
        return x_t

    return proxy(advance, denoise.start(noise), router.scores(), threshold)


def _released_proxy(advance: Callable[..., Tensor], x_t: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Pass i is routed down to step i and computed after it: each continues the routed run that all share."""
    proxy_weights = scores.new_zeros(len(scores))
    first_step = len(scores) - 1
    previous_x0 = advance(x_t, range(first_step, -1, -1))
    cache = SoftCache(scores, threshold)
    x_t = advance(x_t, range(first_step, first_step - 1, -1), cache)
    for step in reversed(range(first_step)):
        x_t = advance(x_t, range(step, step - 1, -1), cache)
        x0 = advance(x_t, range(step - 1, -1, -1))
        proxy_weights[step] = (x0 - previous_x0).square().mean()
        previous_x0 = x0
    return proxy_weights


def _paper_proxy(advance: Callable[..., Tensor], x_t: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Pass i leaves the routed run before step i, with a copy of its store, and goes on to its own x_0."""
    first_step = len(scores) - 1
    cache = SoftCache(scores, threshold)
    x_t = advance(x_t, range(first_step, first_step - 1, -1), cache)
    x0_without = {}
    for step in reversed(range(first_step)):
        one_computed = scores.clone()
        one_computed[step] = 1.0
        branch = SoftCache(one_computed, threshold)
        branch.restore(cache.snapshot())
        x0_without[step] = advance(x_t, range(step, -1, -1), branch)
        x_t = advance(x_t, range(step, step - 1, -1), cache)
    proxy_weights = scores.new_zeros(len(scores))
    for step, x0 in x0_without.items():
        proxy_weights[step] = (x0 - x_t).square().mean()
    return proxy_weights
