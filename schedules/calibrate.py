"""The weights of reuse of any schedule, solved by least squares in one run: no training, no images.

For another guidance, sampler, number of samples or checkpoint than a router was trained with, or for
schedules that nobody trained (FORA). Along a trajectory sampled under the schedule every reused branch is
computed too, and its output is fitted by its last K computed outputs, cell by cell, in the order of
execution: each fit sees the errors that reuse has made before it.
"""

import torch

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
    generators = [sample_generator(seed, CALIBRATION_STREAM, k) for k in range(num_samples)]
    noise = draw_noise(model, generators).to(model.device)
    labels = draw_labels(model, generators).to(model.device)
    cache = FittingCache(schedule.compute, num_terms)
    step_noise = draw_step_noise(trajectory, noise, generators)
    with one_thread(model.device):
        for _ in denoise_loop(trajectory, labels, noise, cache, step_noise):
            pass
    return Schedule(schedule.compute, f"{schedule.source}, calibrated", cache.weights.to(torch.float32))
