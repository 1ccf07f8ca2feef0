"""The weights of reuse of any schedule, solved by least squares in one run: no training, no images.

It serves untrained schedules (FORA), and routers that sample in another setting (guidance, sampler, number of
samples, checkpoint) than they were trained in. Along a trajectory under the schedule every reused branch is
computed too, and its output is fitted by its last K computed outputs, cell by cell, in the order of
execution: each fit sees the errors that earlier reuse has made.
"""

import torch
from torch import Tensor

from cache import FittingCache
from common.devices import one_thread
from router import Schedule
from sampling.loop import Trajectory, denoise_loop, draw_step_noise
from sampling.seeds import CALIBRATION_STREAM, draw_labels, draw_noise, sample_generator


def calibrated(trajectory: Trajectory, num_terms: int = 3, num_samples: int = 64, seed: int = 0) -> Schedule:
    """The trajectory's schedule with weights (T, B, num_terms) for its model, sampler and guidance.

    Draws `num_samples` random labels and noise from the seed, apart from those of sampling and training; they
    go through the model as one batch, on a CPU in one thread, so that the weights do not depend on the number
    of cores. The work of one uncached run of them.
    """
    model, schedule = trajectory.backbone, trajectory.schedule
    labels, noise, step_noise = calibration_batch(trajectory, num_samples, seed)
    cache = FittingCache(schedule.compute, num_terms)
    with one_thread(model.device):
        for _ in denoise_loop(trajectory, labels, noise, cache, step_noise):
            pass
    return Schedule(schedule.compute, f"{schedule.source}, calibrated", cache.weights.to(torch.float32))


def calibration_batch(
    trajectory: Trajectory, num_samples: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Labels (n,), noise (n, C, H, W) and the sampler's noise, apart from those of sampling and training."""
    model = trajectory.backbone
    generators = [sample_generator(seed, CALIBRATION_STREAM, k) for k in range(num_samples)]
    noise = draw_noise(model, generators).to(model.device)
    labels = draw_labels(model, generators).to(model.device)
    return labels, noise, draw_step_noise(trajectory, noise, generators)
