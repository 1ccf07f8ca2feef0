"""The error of the final image under a cache, against an uncached reference trajectory, and its gradients."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from backbones.contract import Backbone
from backbones.denoiser import Denoiser, executed, walk
from cache import FittingCache, GatedCache
from diffusion import GaussianDiffusion, Sampler, State, as_sampler
from end_to_end.moments import Reduce, moment_error_over_ranks


@dataclass(frozen=True)
class ReferenceTrajectory:
    """Noise and labels, and the uncached trajectory that starts from them.

    noise: (n, C, H, W); labels: (n,). states: T tensors (n, C, H, W), x after every step; states[0] is x_0.
    Empty where it is not sampled yet.
    importance: (n,), the weight of each sample in a mean; None: all count alike.
    """

    model: Backbone
    diffusion: GaussianDiffusion | Sampler
    noise: Tensor
    labels: Tensor
    cfg_scale: float
    states: Sequence[Tensor] = ()
    importance: Tensor | None = None

    @classmethod
    def draw(
        cls,
        model: Backbone,
        diffusion: GaussianDiffusion | Sampler,
        noise: Tensor,
        labels: Tensor,
        cfg_scale: float,
    ) -> "ReferenceTrajectory":
        """Sample it. diffusion: a sampler, or a chain for deterministic DDIM."""
        return cls(model, diffusion, noise, labels, cfg_scale).sampled()

    @torch.no_grad()
    def sampled(self) -> "ReferenceTrajectory":
        """The same with its states, in one uncached run."""
        denoise = Denoiser(self.model, self.diffusion, self.labels, self.cfg_scale)
        uncached = walk(denoise.advance, denoise.start(self.noise), executed(self.num_steps))
        states = [state.x[: len(self.noise)] for _, state in uncached]
        return dataclasses.replace(self, states=states[::-1])

    @property
    def num_steps(self) -> int:
        return as_sampler(self.diffusion).num_steps

    def rollout(
        self, cache: GatedCache | FittingCache, recompute: bool = False, window: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """The trajectory under `cache`, differentiable; yields (step, x after it), at last x_0 (n, C, H, W).

        recompute: between steps keep only x_t and what is new in the store, and run each step again for its
        gradient (activation checkpointing by step): the same gradients for a third more time. window: cut
        the gradient after every `window` steps.
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

    def errors(
        self, cache: GatedCache | FittingCache, recompute: bool = False, window: int | None = None
    ) -> list[Tensor]:
        """Mean squared error (n,) of every sample against its uncached x, times its importance.

        The first entry is the error of x_0. With a window there is one for x at each window's end, the
        noisiest last.
        """
        return [one.square().mean(1) for one in self.deviations(cache, recompute, window)]

    def deviations(
        self, cache: GatedCache | FittingCache, recompute: bool = False, window: int | None = None
    ) -> list[Tensor]:
        """x minus the uncached x, times the root of each sample's importance: (n, C * H * W) an entry.

        The entries are those of `errors`.
        """
        every = window or len(self.states)
        deviations = [
            (x - self.states[step]).flatten(1)
            for step, x in self.rollout(cache, recompute, window)
            if step % every == 0
        ]
        if self.importance is not None:
            deviations = [one * self.importance.sqrt()[:, None] for one in deviations]
        return deviations[::-1]

    def moment_error(self, deviation: Tensor, in_pixels: bool, count: int, reduce: Reduce) -> Tensor:
        """How far the images' mean and variance are from the uncached ones', 0-dim and differentiable.

        deviation: (n, d) of x_0, from `deviations`. in_pixels: values are first cut to [-1, 1], as a picture
        cuts them. count, reduce: see `moments.moment_error_over_ranks`.
        """
        importance = (
            torch.ones_like(deviation[:, :1]) if self.importance is None else self.importance[:, None]
        )
        before = self.states[0].flatten(1)
        after = before + deviation / importance.sqrt()
        if in_pixels:
            before, after = before.clamp(-1, 1), after.clamp(-1, 1)
        return moment_error_over_ranks(before, after, importance, count, reduce)


def toggle_effects(
    reference: ReferenceTrajectory,
    compute: Tensor,
    reuse_weights: Tensor,
    store_gradient: bool,
    generators: Sequence[torch.Generator],
    asked: Tensor | None = None,
    probes: int = 2,
    recompute: bool = False,
) -> Tensor:
    """Change (T, B) of the mean squared error of x_0 by toggling each cell of a schedule, to second order.

    A gate w moves x_0 by u = dx_0/dw. With e = x_0 - uncached x_0, toggling changes |e|^2 by
    `+-2 e.u + |u|^2`. The first term is the gradient of |e|^2. The second is the mean of (v.u)^2 over random
    v of unit covariance: a Hutchinson estimate (M. F. Hutchinson 1989, A stochastic estimator of the trace of
    the influence matrix for Laplacian smoothing splines) of the diagonal of J^T J, with normal probes v,
    where J is the Jacobian of x_0 in the gates. With one gate per sample, one forward and 1 + `probes`
    backward passes give both terms for all cells at once. The second term matters: around a computed cell the
    first alone is nearly zero, whatever reuse would do.

    compute: bool (T, B). reuse_weights: (T, B, K), those of computed cells included. generators: one per
    sample, for v. asked: bool (T, B), the cells whose effect is wanted (None: all but the first step's); the
    effect of the others is 0. store_gradient: whether later readers of the store count, as they do where
    reuse takes its last output (scaled at most).
    """
    n = len(reference.noise)
    if asked is None:
        asked = torch.ones_like(compute)
        asked[-1] = False
    gates = compute.to(reference.noise)[..., None].repeat(1, 1, n).requires_grad_()
    cache = GatedCache(gates, reuse_weights, asked, store_gradient)
    (e,) = reference.deviations(cache, recompute)
    size = reference.noise[0].numel()
    (first,) = torch.autograd.grad(e.square().sum(), gates, retain_graph=True)
    second = torch.zeros_like(first)
    for probe in range(probes):
        v = torch.stack([torch.randn(e.shape[1:], generator=one) for one in generators]).to(e)
        (along,) = torch.autograd.grad((v * e).sum(), gates, retain_graph=probe + 1 < probes)
        second += along.square() / probes
    sign = torch.where(compute, -1.0, 1.0).to(first)
    return (sign * first.mean(-1) + second.mean(-1)) / size
