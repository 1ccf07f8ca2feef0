"""The error of the final image: trajectories under a cache beside the uncached ones, and its gradients."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from backbones.denoiser import Denoiser, executed, walk
from cache import GatedCache
from diffusion import GaussianDiffusion, State
from models import DiT


@dataclass(frozen=True)
class Paired:
    """Noise and labels, and the uncached DDIM trajectory that starts from them.

    noise: (n, C, H, W); labels: (n,). states: T tensors (n, C, H, W), x after every step; states[0] is x_0.
    importance: (n,), what each sample weighs in a mean; None: all the same.
    """

    model: DiT
    diffusion: GaussianDiffusion
    noise: Tensor
    labels: Tensor
    cfg_scale: float
    states: list[Tensor]
    importance: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def draw(
        cls, model: DiT, diffusion: GaussianDiffusion, noise: Tensor, labels: Tensor, cfg_scale: float
    ) -> "Paired":
        denoise = Denoiser(model, diffusion, labels, cfg_scale)
        reference = walk(denoise.advance, denoise.start(noise), executed(denoise.num_steps))
        states = [state.x[: len(noise)] for _, state in reference]
        return cls(model, diffusion, noise, labels, cfg_scale, states[::-1])

    def rollout(
        self, cache: GatedCache, recompute: bool = False, window: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """The trajectory under `cache`, differentiable; yields (step, x after it), at last x_0 (n, C, H, W).

        recompute: keep only x_t and what is new in the store between steps, and run each step again for its
        gradient (activation checkpointing by step; the same gradients, a third more time). window: no
        gradient passes from one stretch of as many steps to the one before it.
        """
        denoise = Denoiser(self.model, self.diffusion, self.labels, self.cfg_scale, cache.computed)

        def advance(place: tuple[State, list], step: int) -> tuple[State, list]:
            state, stored = place
            if window and (step + 1) % window == 0:
                state = state.detach()
                stored = [tuple(output.detach() for output in outputs) for outputs in stored]
            if recompute and torch.is_grad_enabled():
                setting = {"use_reentrant": False, "preserve_rng_state": False}
                return checkpoint(routed, state, stored, step, **setting)
            return routed(state, stored, step)

        def routed(state: State, stored: list, step: int) -> tuple[State, list]:
            cache.restore(stored)
            return denoise.advance(state, step, cache), cache.snapshot()

        place = denoise.start(self.noise), cache.snapshot()
        for step, (state, _) in walk(advance, place, executed(denoise.num_steps)):
            yield step, state.x[: len(self.noise)]

    def errors(self, cache: GatedCache, recompute: bool = False, window: int | None = None) -> list[Tensor]:
        """Mean squared error (n,) of every sample against its uncached x, times its importance.

        The first entry is x_0's. With a window there is one for the x at each window's end, noisiest last.
        """
        return [one.square().mean(1) for one in self.deviations(cache, recompute, window)]

    def deviations(
        self, cache: GatedCache, recompute: bool = False, window: int | None = None
    ) -> list[Tensor]:
        """(n, C * H * W) each: x less the uncached x, times the root of each sample's importance."""
        every = window or len(self.states)
        away = [
            (x - self.states[step]).flatten(1)
            for step, x in self.rollout(cache, recompute, window)
            if step % every == 0
        ]
        if self.importance is not None:
            away = [one * self.importance.sqrt()[:, None] for one in away]
        return away[::-1]

    def moments(
        self, deviation: Tensor, in_pixels: bool, count: int, reduce: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """How far the images' mean and variance are from the uncached ones': 0-dim, differentiable.

        `count * (mean(change of the mean image ^ 2) + (change of the variance)^2 / variance)`; the variance
        is one number, the mean squared distance of elements from the uncached mean image. The least squared
        error has some of both: what cannot be told is left at its mean. deviation: (n, d) of x_0, from
        `deviations`. in_pixels: values outside [-1, 1] are cut first, as a picture would. count: samples of
        all ranks, over which `reduce` averages; errors that samples do not share add about their own mean
        square, whatever it is. Means are weighed by importance. The gradient is that of this rank's samples,
        to be averaged.
        """
        weights = torch.ones_like(deviation[:, :1]) if self.importance is None else self.importance[:, None]
        before = self.states[0].flatten(1)
        after = before + deviation / weights.sqrt()
        if in_pixels:
            before, after = before.clamp(-1, 1), after.clamp(-1, 1)
        centre = reduce((weights * before).mean(0))
        variance = reduce((weights * (before - centre).square()).mean())
        of_mean = _square((weights * (after - before)).mean(0), reduce).mean()
        gained = weights * ((after - centre).square() - (before - centre).square())
        return count * (of_mean + _square(gained.mean(), reduce) / variance.clamp(min=1e-12))


def _square(own: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """The square of the mean of all ranks' `own`; averaged over ranks it has the right gradient, too."""
    of_all = reduce(own.detach().clone())
    return 2 * own * of_all - of_all.square()


def toggle_effects(
    paired: Paired,
    compute: Tensor,
    weights: Tensor,
    store_gradient: bool,
    generators: Sequence[torch.Generator],
    soft: Tensor | None = None,
    probes: int = 2,
    recompute: bool = False,
) -> Tensor:
    """What the mean squared error would change by if a cell were toggled, (T, B), to second order.

    A gate w moves x_0 by u = dx_0/dw. With e the error as it is, toggling changes |e|^2 by `+-2 e.u + |u|^2`:
    the first term is the gradient of |e|^2, the second the mean of (v.u)^2 over random v of unit covariance,
    so one forward and 1 + `probes` backward passes with one gate per sample tell it of all cells at once. The
    second term matters: around a computed cell the first alone is nearly zero, whatever reuse would do.

    compute: bool (T, B); weights: (T, B, K), those of computed cells too. generators: of v, one per sample.
    soft: the cells asked about (None: all but the first step's); others are 0. store_gradient: whether later
    readers of the store count, as they do where they take its last output (scaled at most).
    """
    n = len(paired.noise)
    if soft is None:
        soft = torch.ones_like(compute)
        soft[-1] = False
    gates = compute.to(paired.noise)[..., None].repeat(1, 1, n).requires_grad_()
    cache = GatedCache(gates, weights, soft, store_gradient)
    (e,) = paired.deviations(cache, recompute)
    size = paired.noise[0].numel()
    (first,) = torch.autograd.grad(e.square().sum(), gates, retain_graph=True)
    second = torch.zeros_like(first)
    for probe in range(probes):
        v = torch.stack([torch.randn(e.shape[1:], generator=one) for one in generators]).to(e)
        (along,) = torch.autograd.grad((v * e).sum(), gates, retain_graph=probe + 1 < probes)
        second += along.square() / probes
    sign = torch.where(compute, -1.0, 1.0).to(first)
    return (sign * first.mean(-1) + second.mean(-1)) / size
