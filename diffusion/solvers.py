"""Solvers of few steps: DPM-Solver++ (2M), SA-Solver, and Euler for flow matching.

What they remember of earlier steps is in the state, so a trajectory may branch, be replayed and be trained
through. They space their timesteps themselves, as diffusers' schedulers do by default.

| name | source | remembers |
|---|---|---|
| `dpm-solver++` | Lu et al. 2022, 2M: of second order, but for the first and the last step | x_0 |
| `sa-solver` | Xue et al. 2023: predictor and corrector of order 2; noise at t 200 to 800 | x_0, x, noise |
| `flow-euler` | Esser et al. 2024 (SD3): x follows the predicted velocity | - |
"""

import copy
import math

import numpy as np
import torch
from torch import Tensor

from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.sampler import State, check_eta

_NUM_TIMESTEPS = 1000


class _NoiseSolver:
    """What solvers of noise-predicting models share: timesteps 999 down to one interval above 0, and levels.

    The linear schedule of betas from 1e-4 to 0.02 is that of DiT and PixArt; `levels` are (alpha, sigma) of
    x_t = alpha x_0 + sigma noise, the last one that of x_0 itself, (1, 0).
    """

    adds_noise, guided_channels, predicts = False, None, "noise"

    def __init__(self, chain: GaussianDiffusion, eta: float = 0.0):
        check_eta(eta)
        self.num_steps = chain.num_timesteps
        spaced = np.linspace(0, _NUM_TIMESTEPS - 1, self.num_steps + 1).round().astype(int)
        self.timesteps = spaced[:0:-1].tolist()  # in the order of execution
        betas = np.linspace(1e-4, 0.02, _NUM_TIMESTEPS, dtype=np.float64)
        kept = np.cumprod(1.0 - betas)[self.timesteps]
        self.levels = [(math.sqrt(one), math.sqrt(1.0 - one)) for one in kept.tolist()]

    def timestep(self, step: int) -> float:
        return self.timesteps[self.num_steps - 1 - step]

    def start(self, x: Tensor) -> State:
        return State(x)

    def add_noise(self, x_0: Tensor, step: int, noise: Tensor) -> State:
        alpha, sigma = self.levels[self.num_steps - 1 - step]
        return State(alpha * x_0 + sigma * noise)


class DPMSolverPP(_NoiseSolver):
    """DPM-Solver++ 2M, deterministic. The state remembers the x_0 that the step before predicted."""

    def __init__(self, chain: GaussianDiffusion, eta: float = 0.0):
        super().__init__(chain, eta)
        self.levels.append((1.0, 0.0))

    def step(self, output: Tensor, state: State, step: int, noise: Tensor | None = None) -> State:  # noqa: ARG002
        done = self.num_steps - 1 - step
        (alpha, sigma), (alpha_next, sigma_next) = self.levels[done : done + 2]
        x_0 = (state.x - sigma * output[:, : state.x.shape[1]]) / alpha
        if step == 0:
            return State(x_0, (x_0,))
        half_step = _log_snr(alpha_next, sigma_next) - _log_snr(alpha, sigma)
        predicted = x_0
        if state.history:
            before = _log_snr(alpha, sigma) - _log_snr(*self.levels[done - 1])
            predicted = x_0 + half_step / (2 * before) * (x_0 - state.history[0])
        x = sigma_next / sigma * state.x - alpha_next * math.expm1(-half_step) * predicted
        return State(x, (x_0,))


class SASolver(_NoiseSolver):
    """SA-Solver on diffusers' `SASolverScheduler`, whose updates are called with the state's values.

    The state remembers what the step before predicted of x_0, started from (corrected) and added as noise.
    """

    adds_noise = True

    def __init__(self, chain: GaussianDiffusion, eta: float = 0.0):
        from diffusers import SASolverScheduler  # slow to import

        super().__init__(chain, eta)
        self._scheduler = SASolverScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
        self._scheduler.set_timesteps(self.num_steps)
        self._order = self._scheduler.config.predictor_order

    def step(self, output: Tensor, state: State, step: int, noise: Tensor | None = None) -> State:
        done = self.num_steps - 1 - step
        scheduler, x, history = copy.copy(self._scheduler), state.x, list(state.history)
        scheduler._step_index = done
        x_0 = scheduler.convert_model_output(output[:, : x.shape[1]], sample=x)
        if history:
            before, started, added = history
            scheduler.model_outputs = [None, before]
            x = scheduler.stochastic_adams_moulton_update(
                this_model_output=x_0, last_sample=started, last_noise=added, this_sample=x,
                order=min(done + 1, 2), tau=self._tau(done - 1),
            )  # fmt: skip
        scheduler.model_outputs = [*history[:1], x_0]
        order = min(self._order, done + 1, self.num_steps - done)
        after = scheduler.stochastic_adams_bashforth_update(
            model_output=x_0, sample=x, noise=noise, order=order, tau=self._tau(done)
        )
        return State(after, (x_0, x, noise))

    def _tau(self, done: int) -> Tensor:
        return torch.tensor(float(self._scheduler.tau_func(self.timesteps[done])))


class FlowEuler:
    """Euler's method along the velocity that a model of flow matching predicts; x_t = (1 - s) x_0 + s noise.

    sigmas: s in the order of execution, T values and 0 at the end; the model's timestep is 1000 s.
    """

    adds_noise, guided_channels, predicts = False, None, "velocity"

    def __init__(self, sigmas: list[float]):
        self.sigmas, self.num_steps = sigmas, len(sigmas) - 1

    @classmethod
    def of_chain(cls, chain: GaussianDiffusion, eta: float = 0.0) -> "FlowEuler":
        """As many steps as a chain has, spaced as SD3's."""
        check_eta(eta)
        return cls.shifted(chain.num_timesteps)

    @classmethod
    def shifted(cls, num_steps: int, shift: float = 3.0) -> "FlowEuler":
        """SD3's spacing, as diffusers' `FlowMatchEulerDiscreteScheduler(shift=shift)` makes it."""
        least = _shifted(1 / _NUM_TIMESTEPS, shift)
        even = np.linspace(1.0, least, num_steps)
        return cls([*(_shifted(one, shift) for one in even.tolist()), 0.0])

    def timestep(self, step: int) -> float:
        return _NUM_TIMESTEPS * self.sigmas[self.num_steps - 1 - step]

    def start(self, x: Tensor) -> State:
        return State(x)

    def add_noise(self, x_0: Tensor, step: int, noise: Tensor) -> State:
        sigma = self.sigmas[self.num_steps - 1 - step]
        return State((1 - sigma) * x_0 + sigma * noise)

    def step(self, output: Tensor, state: State, step: int, noise: Tensor | None = None) -> State:  # noqa: ARG002
        done = self.num_steps - 1 - step
        velocity = output[:, : state.x.shape[1]]
        return State(state.x + (self.sigmas[done + 1] - self.sigmas[done]) * velocity)


def _shifted(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _log_snr(alpha: float, sigma: float) -> float:
    """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
    return math.log(alpha) - math.log(sigma)
