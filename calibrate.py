"""The weights of reuse of any schedule, solved by least squares in one run: no training, no images.

For another guidance, sampler, number of samples or checkpoint than a router was trained with, or for
schedules that nobody trained (FORA). Along a trajectory sampled under the schedule every reused branch is
computed too, and its output is fitted by its last K computed outputs, cell by cell, in the order of
execution: each fit sees the errors that reuse has made before it.
"""

import torch

from cache import FittingCache
from diffusion import GaussianDiffusion
from execution import one_thread
from models import DiT
from router import Schedule
from sampling import (
    CALIBRATION_STREAM,
    denoise_loop,
    draw_labels,
    draw_noise,
    draw_step_noise,
    sample_generator,
)


def calibrated(
    model: DiT,
    diffusion: GaussianDiffusion,
    schedule: Schedule,
    num_terms: int = 3,
    num_samples: int = 64,
    cfg_scale: float = 1.0,
    sampler: str = "ddim",
    seed: int = 0,
) -> Schedule:
    """The schedule with weights (T, B, num_terms) for this model, chain, guidance and sampler.

    Draws `num_samples` random labels and noise from the seed, apart from those of sampling and training; they
    go through the model as one batch, on a CPU in one thread, so that the weights do not depend on the number
    of cores. The work of one uncached run of them.
    """
    device = next(model.parameters()).device
    generators = [sample_generator(seed, CALIBRATION_STREAM, k) for k in range(num_samples)]
    noise, labels = draw_noise(model, generators).to(device), draw_labels(model, generators).to(device)
    cache = FittingCache(schedule.compute, num_terms)
    step_noise = draw_step_noise(diffusion, noise, cfg_scale, sampler, 0.0, generators)
    setting = cfg_scale, sampler, cache
    with one_thread(device):
        for _ in denoise_loop(model, diffusion, labels, noise, *setting, step_noise=step_noise):
            pass
    return Schedule(schedule.compute, f"{schedule.source}, calibrated", cache.weights.to(torch.float32))
