"""The weights of reuse of any schedule, fitted to outputs in one run: no training, no images.

| weights | each fit sees | source |
|---|---|---|
| `calibrated` | the errors that earlier reuse has made | ours |
| `linear` | an uncached trajectory | in the manner of L2P (2604.26365) |
| `dynamic_modes` | the last three computed outputs of an uncached trajectory | in the manner of HiCache++ |

They serve untrained schedules (FORA), and routers that sample in another setting (guidance, sampler, number
of samples, checkpoint) than they were trained in.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from backbones.denoiser import Denoiser, executed, walk
from cache import FittingCache
from common.devices import one_thread
from diffusion import State
from router import Schedule
from sampling.loop import Trajectory, denoise_loop, draw_step_noise
from sampling.seeds import CALIBRATION_STREAM, draw_labels, draw_noise, sample_generator
from schedules.forecasts import weighted


def calibrated(trajectory: Trajectory, num_terms: int = 3, num_samples: int = 64, seed: int = 0) -> Schedule:
    """The trajectory's schedule with weights (T, B, num_terms) for its model, sampler and guidance.

    Along a trajectory under the schedule every reused branch is computed too, and its output is fitted by its
    last K computed outputs, cell by cell, in the order of execution.
    Draws `num_samples` random labels and noise from the seed, apart from those of sampling and training; they
    go through the model as one batch, on a CPU in one thread, so that the weights do not depend on the number
    of cores. The work of one uncached run of them.
    """
    return _solved(trajectory, "calibrated", _fitted(trajectory, num_terms, num_samples, seed).weights)


def linear(trajectory: Trajectory, num_terms: int = 3, num_samples: int = 64, seed: int = 0) -> Schedule:
    """The same with each output fitted by those of an uncached trajectory, as L2P trains its weights.

    L2P fits one set of weights a step, for the last layer's output; here each branch has its own. Its
    gradient descent on the mean squared error is solved at once.
    """
    fitted = _fitted(trajectory, num_terms, num_samples, seed, uncached=True)
    return _solved(trajectory, "linear weights", fitted.weights)


def dynamic_modes(trajectory: Trajectory, num_samples: int = 64, seed: int = 0) -> Schedule:
    """The trajectory's schedule with forecasts by dynamic mode decomposition of the last three outputs.

    Where these lie h steps apart each, F_0 = c_1 F_1 + c_2 F_2 is solved by least squares. That is a linear
    map of (F_1, F_2) to (F_0, F_1), and its power d / h takes the last output d steps further: two modes
    that grow, decay or turn. c comes from all samples of a branch together, where the original fits each
    sample apart. Where fewer outputs are stored, or they are not evenly spaced, a line takes their place.
    """
    gram = _fitted(trajectory, 3, num_samples, seed, uncached=True).gram

    def weights(computed_at: list[int], step: int, branch: int) -> Tensor:
        distance = computed_at[0] - step
        if len(computed_at) == 1:
            return torch.ones(1)
        h = computed_at[1] - computed_at[0]
        if len(computed_at) == 3 and computed_at[2] - computed_at[1] == h:
            powers = mode_weights(gram[step, branch].numpy(), distance / h)
            if powers is not None:
                return torch.from_numpy(powers)
        return torch.tensor([1 + distance / h, -distance / h])

    return weighted(trajectory.schedule, "dynamic modes", 3, weights)


def mode_weights(gram: np.ndarray, power: float) -> np.ndarray | None:
    """Weights (2,) of F_0 and F_1 for the output `power` intervals after F_0; None: the modes are no basis.

    gram: (3, 3), products of the outputs F_0 (the last one), F_1 and F_2.
    """
    try:
        c = np.linalg.solve(gram[1:, 1:], gram[0, 1:])
        values, vectors = np.linalg.eig(np.array([c, [1.0, 0.0]], dtype=complex))
        powered = vectors @ np.diag(values**power) @ np.linalg.inv(vectors)
    except np.linalg.LinAlgError:
        return None
    return powered[0].real if np.isfinite(powered).all() else None


def _fitted(
    trajectory: Trajectory, num_terms: int, num_samples: int, seed: int, uncached: bool = False
) -> FittingCache:
    model, schedule = trajectory.backbone, trajectory.schedule
    labels, noise, step_noise = calibration_batch(trajectory, num_samples, seed)
    cache = FittingCache(schedule.compute, num_terms, uncached=uncached)
    with one_thread(model.device):
        for _ in denoise_loop(trajectory, labels, noise, cache, step_noise):
            pass
    return cache


def _solved(trajectory: Trajectory, name: str, weights: Tensor) -> Schedule:
    schedule = trajectory.schedule
    return Schedule(schedule.compute, f"{schedule.source}, {name}", weights.to(torch.float32))


def calibration_batch(
    trajectory: Trajectory, num_samples: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Labels (n,), noise (n, C, H, W) and the sampler's noise, apart from those of sampling and training."""
    model = trajectory.backbone
    generators = [sample_generator(seed, CALIBRATION_STREAM, k) for k in range(num_samples)]
    noise = draw_noise(model, generators).to(model.device)
    labels = draw_labels(model, generators).to(model.device)
    return labels, noise, draw_step_noise(trajectory, noise, generators)


@torch.no_grad()
def uncached_outputs(trajectory: Trajectory, num_samples: int, seed: int = 0) -> Iterator[Tensor]:
    """The model's (guided) output at every step of an uncached run of calibration samples, one batch."""
    labels, noise, step_noise = calibration_batch(trajectory, num_samples, seed)
    denoise = Denoiser(trajectory.backbone, trajectory.sampler, labels, trajectory.cfg_scale)
    last: list[Tensor] = []

    def advance(state: State, step: int) -> State:
        last[:] = [denoise(state.x, step)]
        return denoise.sampler.step(last[0], state, step, None if step_noise is None else step_noise[step])

    with one_thread(noise.device):
        for _ in walk(advance, denoise.start(noise), executed(denoise.num_steps)):
            yield last[0]
