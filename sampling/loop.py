"""The denoising loop: a trajectory from noise to x_0, one batch, or many samples each with its own seed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from backbones.contract import Backbone
from backbones.denoiser import Denoiser, executed, halves, sampler_for, walk
from cache import Combine, StaticCache
from diffusion import GaussianDiffusion, Sampler, State, as_sampler
from router import Schedule
from sampling.decoding import require_finite
from sampling.seeds import SAMPLING_STREAM, draw_noise, sample_generator

Generators = torch.Generator | Sequence[torch.Generator] | None


class Rule(Protocol):
    """How a cache decides while it samples: `schedules/dynamic.py`."""

    num_steps: int
    num_branches: int

    def cache(self, trajectory: "Trajectory", dtype: torch.dtype | None = None) -> Any:
        """The policy of one run."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """All that fixes a trajectory, except for its noise and labels: backbone x sampler x schedule.

    sampler: a sampler, or a chain for deterministic DDIM. cfg_scale: guidance, 1 = off. schedule: which
    branches are computed, or the rule by which a cache decides that; None: all. Raises ValueError where the
    schedule fits neither the backbone nor the sampler.
    """

    backbone: Backbone
    sampler: Sampler
    cfg_scale: float = 1.0
    schedule: Schedule | Rule | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler", as_sampler(self.sampler))
        schedule, num_steps, branches = self.schedule, self.sampler.num_steps, self.backbone.num_branches
        if schedule is None:
            return
        if schedule.num_steps != num_steps:
            raise ValueError(
                f"the schedule is for {schedule.num_steps} steps, the sampler takes {num_steps}; "
                f"use --num-sampling-steps {schedule.num_steps} or another router"
            )
        if schedule.num_branches != branches:
            raise ValueError(
                f"the schedule is for {schedule.num_branches} branches, the model has {branches}; "
                "use a router trained for this model"
            )

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        chain: GaussianDiffusion,
        cfg_scale: float = 1.0,
        sampler: str = "ddim",
        schedule: Schedule | Rule | None = None,
        eta: float = 0.0,
    ) -> "Trajectory":
        """The sampler by name, on a chain. Raises ValueError for an unknown one, or an eta outside [0, 1]."""
        return cls(backbone, sampler_for(backbone, sampler, chain, eta), cfg_scale, schedule)

    def cache(self, dtype: torch.dtype | None = None, combine: Combine | None = None) -> Any:
        """The policy of one run, with an empty store; None where every branch is computed."""
        if self.schedule is None:
            return None
        if not isinstance(self.schedule, Schedule):
            return self.schedule.cache(self, dtype)
        return StaticCache(self.schedule, dtype, combine, self.backbone.device)

    def check(self, labels: Tensor, noise: Tensor) -> None:
        if len(labels) != len(noise):
            raise ValueError(
                f"{len(labels)} labels for {len(noise)} noise samples; give one label per sample"
            )


@torch.no_grad()
def denoise_loop(
    trajectory: Trajectory,
    labels: Tensor,
    noise: Tensor,
    cache=None,
    step_noise: Tensor | None = None,
    condition: Any = None,
) -> Iterator[tuple[int, Tensor]]:
    """Denoise step by step under a cache policy; yields (step, x after it), at last x_0.

    cache: any policy, which replaces the trajectory's schedule; None: every branch is computed. step_noise:
    from `draw_step_noise`. condition: what the backbone makes of the labels, if that is done already. The
    device never waits for the host here, unless the backbone makes a condition of labels on the host.
    """
    computed = None if cache is None else cache.computed
    setting = trajectory.backbone, trajectory.sampler, labels, trajectory.cfg_scale
    denoise = Denoiser(*setting, computed, condition)

    def advance(state: State, step: int) -> State:
        return denoise.advance(state, step, cache, None if step_noise is None else step_noise[step])

    for step, state in walk(advance, denoise.start(noise), executed(denoise.num_steps)):
        yield step, state.x[: len(noise)]


def sample(
    trajectory: Trajectory,
    labels: Tensor,
    noise: Tensor,
    generator: Generators = None,
    cache_dtype: torch.dtype | None = None,
    combine: Combine | None = None,
) -> Tensor:
    """Denoise `noise` (n, C, H, W) under `labels` (n,) to x_0 (n, C, H, W).

    generator: draws the noise that DDPM, or DDIM with eta > 0, adds: one generator for the batch (None:
    torch's global one), or one per sample, so that a sample does not depend on its batch. cache_dtype: dtype
    of the stored branch outputs, None: the model's. combine: what combines them, as `cache.StaticCache` takes
    it. Raises ValueError where labels and noise do not fit.
    """
    trajectory.check(labels, noise)
    step_noise = draw_step_noise(trajectory, noise, generator)
    cache = trajectory.cache(cache_dtype, combine)
    *_, (_, x_0) = denoise_loop(trajectory, labels, noise, cache, step_noise)
    return x_0


Sample = Callable[[Trajectory, Tensor, Tensor, Generators], Tensor]  # `sample`, or a function in its place


def generate(
    model: Backbone,
    diffusion: GaussianDiffusion,
    labels: Tensor,
    noise: Tensor,
    cfg_scale: float = 1.0,
    sampler: str = "ddim",
    schedule: Schedule | None = None,
    eta: float = 0.0,
    generator: Generators = None,
    progress: bool = False,
) -> Tensor:
    """x_0 (n, C, H, W) of noise (n, C, H, W) under labels (n,), as `Trajectory.of` and `sample` have it.

    sampler: "ddim" (with `eta`) or "ddpm". schedule: which branches to compute; None computes all. progress:
    show a bar over the steps. Raises ValueError where schedule, labels or sampler do not fit the model or the
    chain.
    """
    trajectory = Trajectory.of(model, diffusion, cfg_scale, sampler, schedule, eta)
    trajectory.check(labels, noise)
    step_noise = draw_step_noise(trajectory, noise, generator)
    steps = denoise_loop(trajectory, labels, noise, trajectory.cache(), step_noise)
    *_, (_, x_0) = tqdm(steps, total=diffusion.num_timesteps, unit="step", disable=None if progress else True)
    return x_0


def generate_seeded(
    trajectory: Trajectory,
    labels: Tensor,
    seed: int,
    batch_size: int | None = None,
    progress: bool = False,
    first: int = 0,
    sample: Sample = sample,
) -> Tensor:
    """x_0 (n, C, H, W) of n samples from `first` on, with labels (n,). Sample k depends on (seed, k) alone.

    So methods are compared on the same noise, whatever their batch size. sample: the function above, or one
    of `execution` in its place. Works on the model's device. Raises ValueError where a sample is not
    finite, naming it.
    """
    device, batch_size = trajectory.backbone.device, batch_size or len(labels)
    parts = []
    for start in tqdm(range(0, len(labels), batch_size), desc="batches", disable=None if progress else True):
        y = labels[start : start + batch_size].to(device)
        generators = [sample_generator(seed, SAMPLING_STREAM, first + start + k) for k in range(len(y))]
        noise = draw_noise(trajectory.backbone, generators).to(device)
        parts.append(sample(trajectory, y, noise, generators))
    x_0 = torch.cat(parts)
    require_finite(x_0, first)
    return x_0


def draw_step_noise(trajectory: Trajectory, noise: Tensor, generator: Generators) -> Tensor | None:
    """Fresh noise (T, N, C, H, W) for every step, N = n or 2n; None where the sampler adds none.

    All of it is drawn before the first step, in the order of execution, so that the device never waits for
    the host. With one generator both halves of a guided batch draw their own noise, as in the official
    sampler. With one generator per sample the halves share their noise: only the first half of x_t is read.
    """
    if not trajectory.sampler.adds_noise:
        return None
    rows = halves(trajectory.backbone, trajectory.cfg_scale)
    shape = (rows * len(noise), *noise.shape[1:])

    def draw() -> Tensor:
        if generator is None:
            return torch.randn(shape, device=noise.device, dtype=noise.dtype)
        if isinstance(generator, torch.Generator):
            return torch.randn(shape, generator=generator, device=generator.device)
        own = [torch.randn(shape[1:], generator=one, device=one.device) for one in generator]
        return torch.cat([torch.stack(own)] * rows)

    drawn = [draw() for _ in range(trajectory.sampler.num_steps)]
    return torch.stack(drawn[::-1]).to(noise.device)
