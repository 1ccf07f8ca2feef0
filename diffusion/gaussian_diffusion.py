"""One Gaussian diffusion chain: tables, posterior, DDIM and DDPM steps, and DiT's training loss.

Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM, eq. 12 and 16), Nichol and Dhariwal 2021 (learned-range
variance, hybrid loss). The network predicts noise. Left out on purpose: other parametrizations, other
schedules, clipping of x_0.

A *step* is an int in [0, num_timesteps); `timestep_map[step]` is the timestep of the original chain that the
model receives. Sampling passes steps as Python ints, so no coefficient is ever read back from a device;
training passes a tensor of them.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Posterior(NamedTuple):
    """The estimates of x_0, eps and the next x_t from a model output; every field is (N, C, H, W)."""

    pred_x0: Tensor
    eps: Tensor
    mean: Tensor
    log_variance: Tensor


class GaussianDiffusion:
    """A chain of kept timesteps with its float64 tables, one entry per step."""

    def __init__(self, diffusion_steps: int, kept_timesteps: list[int], learn_sigma: bool = True):
        self.learn_sigma = learn_sigma
        self.timestep_map = list(kept_timesteps)
        self.num_timesteps = len(kept_timesteps)
        scale = 1000 / diffusion_steps
        full_betas = np.linspace(scale * 0.0001, scale * 0.02, diffusion_steps, dtype=np.float64)
        kept_alphas_cumprod = np.cumprod(1.0 - full_betas)[self.timestep_map]

        self.betas = 1.0 - kept_alphas_cumprod / np.append(1.0, kept_alphas_cumprod[:-1])
        alphas = 1.0 - self.betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.posterior_variance = self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        # The variance is 0 at the end of the chain: its log is taken from the step before.
        last_variance = self.posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(last_variance, self.posterior_variance[1:]))

        self._log_betas = np.log(self.betas)
        self._x0_from_xt = np.sqrt(1.0 / self.alphas_cumprod)
        self._x0_from_eps = np.sqrt(1.0 / self.alphas_cumprod - 1.0)
        self._mean_from_x0 = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self._mean_from_xt = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)

    def timesteps(self, step: int, n: int, device: torch.device | str) -> Tensor:
        """The model's (n,) timestep input at `step`."""
        return torch.full((n,), self.timestep_map[step], device=device)

    def posterior(self, model_output: Tensor, x_t: Tensor, step: int | Tensor) -> Posterior:
        """The estimates from a model output (N, C or 2C, H, W) at x_t (N, C, H, W).

        step: an int for the whole batch, or an integer tensor (N,).
        """
        eps, variance = model_output.chunk(2, dim=1) if self.learn_sigma else (model_output, None)
        pred_x0 = self._predict_x0(eps, x_t, step)
        mean = _at(self._mean_from_x0, step) * pred_x0 + _at(self._mean_from_xt, step) * x_t
        low = _at(self.posterior_log_variance_clipped, step)
        if variance is None:
            return Posterior(pred_x0, eps, mean, low + torch.zeros_like(mean))
        fraction = (variance + 1) / 2
        log_variance = fraction * _at(self._log_betas, step) + (1 - fraction) * low
        return Posterior(pred_x0, eps, mean, log_variance)

    def _predict_x0(self, eps: Tensor, x_t: Tensor, step: int | Tensor) -> Tensor:
        return _at(self._x0_from_xt, step) * x_t - _at(self._x0_from_eps, step) * eps

    def ddim_step(
        self, model_output: Tensor, x_t: Tensor, step: int, eta: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """One DDIM step from `step` to `step - 1` (from 0 to x_0). eta > 0 needs `noise` (N, C, H, W)."""
        eps = model_output.chunk(2, dim=1)[0] if self.learn_sigma else model_output
        pred_x0 = self._predict_x0(eps, x_t, step)
        alpha, alpha_prev = float(self.alphas_cumprod[step]), float(self.alphas_cumprod_prev[step])
        sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha)) * math.sqrt(1 - alpha / alpha_prev)
        x_prev = math.sqrt(alpha_prev) * pred_x0 + math.sqrt(1 - alpha_prev - sigma**2) * eps
        return x_prev + sigma * noise if sigma > 0 else x_prev

    def ddpm_step(self, model_output: Tensor, x_t: Tensor, step: int, noise: Tensor) -> Tensor:
        """One ancestral step from `step` to `step - 1`; the last one returns its mean."""
        posterior = self.posterior(model_output, x_t, step)
        if step == 0:
            return posterior.mean
        return posterior.mean + torch.exp(0.5 * posterior.log_variance) * noise

    def add_noise(self, x_0: Tensor, steps: int | Tensor, noise: Tensor) -> Tensor:
        """A draw x_t from q(x_t | x_0) at one step, or at a tensor of steps (N,)."""
        signal = _at(np.sqrt(self.alphas_cumprod), steps)
        return signal * x_0 + _at(np.sqrt(1.0 - self.alphas_cumprod), steps) * noise

    def training_loss(
        self, model_output: Tensor, x_0: Tensor, x_t: Tensor, noise: Tensor, steps: Tensor
    ) -> Tensor:
        """Per-sample loss (N,): squared error of the noise, plus the variational bound of a learned variance.

        The bound is in bits per value; its gradient reaches the variance channels only (Nichol and Dhariwal,
        eq. 16).
        """
        channels = x_0.shape[1]
        mse = (model_output[:, :channels] - noise).square().flatten(1).mean(1)  # (N,)
        if not self.learn_sigma:
            return mse
        frozen_mean = torch.cat([model_output[:, :channels].detach(), model_output[:, channels:]], dim=1)
        return mse + self._variational_bound(frozen_mean, x_0, x_t, steps)

    def _variational_bound(self, model_output: Tensor, x_0: Tensor, x_t: Tensor, steps: Tensor) -> Tensor:
        """Bits per value (N,): KL to the true posterior; at step 0 the likelihood of x_0 in 256 levels."""
        predicted = self.posterior(model_output, x_t, steps)
        true_mean = _at(self._mean_from_x0, steps) * x_0 + _at(self._mean_from_xt, steps) * x_t
        true_log_variance = _at(self.posterior_log_variance_clipped, steps)
        difference = true_log_variance - predicted.log_variance
        squared_distance = (true_mean - predicted.mean).square() * torch.exp(-predicted.log_variance)
        kl = 0.5 * (torch.exp(difference) - difference - 1.0 + squared_distance)
        nll = -_log_likelihood_256(x_0, predicted.mean, 0.5 * predicted.log_variance)
        bound = torch.where(steps[:, None, None, None] == 0, nll, kl)
        return bound.flatten(1).mean(1) / math.log(2)


def _at(table: np.ndarray, step: int | Tensor) -> float | Tensor:
    """Entry `step` of a float64 table: a Python float, or float32 (N, 1, 1, 1) for a tensor of steps."""
    if isinstance(step, Tensor):
        return torch.from_numpy(table).float().to(step.device)[step][:, None, None, None]
    return float(table[step])


def _log_likelihood_256(x_0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of x_0 in [-1, 1], rounded to 256 levels, under a Gaussian. Same shape as x_0."""
    normal = torch.distributions.Normal(mean, torch.exp(log_std))
    upper = torch.where(x_0 > 0.999, torch.ones_like(x_0), normal.cdf(x_0 + 1 / 255))
    lower = torch.where(x_0 < -0.999, torch.zeros_like(x_0), normal.cdf(x_0 - 1 / 255))
    return torch.log((upper - lower).clamp(min=1e-12))
