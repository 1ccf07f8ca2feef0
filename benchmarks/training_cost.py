"""What router training costs, in forward passes of the bare model and in memory.

    python benchmark.py --train --model DiT-B/2 --batch-size 2 --num-sampling-steps 10     # all cases

This module holds the cases that `benchmark.py --train` measures:

| case | what runs |
|---|---|
| `forward` | the bare model at every step of a trajectory |
| `update` | a trajectory of step-wise denoising training (SDT), T - 1 updates of a row |
| `update, backbone gradients` | the same with a model that is not frozen, as in the released code |
| `update, branches recomputed` | the same with `--recompute-branches` |
| `update, compiled` (with `--compile`) | the same with `--compile` |
| `update, compiled, branches recomputed` (with `--compile`) | the same with both |
| `refresh` | lambda by the image error proxy; the naive way is T trajectories |
| `end-to-end` | an update of end-to-end training at half of the MACs, activations recomputed |
| `end-to-end, kept` | the same with the activations of all steps kept in memory |
| `end-to-end, search` | the main part of a step of its search: effects of all cells, activations recomputed |
"""

import contextlib
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.contract import Backbone
from backbones.denoiser import condition_for, executed, halves
from backbones.settings import ModelSettings
from cache import GatedCache
from common.timing import alternating, peak_memory, reset_peak_memory
from diffusion import GaussianDiffusion, Sampler, WithNoise, as_sampler
from end_to_end.trajectory import ReferenceTrajectory, toggle_effects
from execution import compile_branches, recompute_branches
from models import DiT
from objectives import image_error_proxy, train_trajectory
from router import Router
from sampling.settings import SamplingSettings
from schedules.baselines import fora_schedule

THRESHOLD, REG_WEIGHT = 0.1, 1e-7
CASES = (
    "forward", "update", "update, backbone gradients", "update, branches recomputed", "refresh",
    "end-to-end", "end-to-end, kept", "end-to-end, search",
)  # fmt: skip
COMPILED = ("update, compiled", "update, compiled, branches recomputed")


@torch.no_grad()
def plain_loop(
    model: Backbone,
    sampler: Sampler | GaussianDiffusion,
    labels: Tensor,
    noise: Tensor,
    cfg_scale: float,
    step_noise: Tensor | None = None,
) -> Tensor:
    """The bare model called at every step and nothing precomputed. Returns x_0 (n, C, H, W).

    sampler: a sampler, or a chain for DDIM. step_noise: (T, N, C, H, W), for a sampler that adds noise.
    """
    sampler, guided = as_sampler(sampler), halves(model, cfg_scale) == 2
    condition = condition_for(model, labels, cfg_scale)
    state = sampler.start(torch.cat([noise, noise]) if guided else noise)
    channels = {} if sampler.guided_channels is None else {"channels": sampler.guided_channels}
    for step in executed(sampler.num_steps):
        x_t = state.x
        x = torch.cat([x_t[: len(noise)]] * 2) if guided else x_t
        t = torch.full((len(x),), sampler.timestep(step), device=x.device)
        out = _bare(model, x.to(model.dtype), t, condition)
        out = model.guide(out, cfg_scale, **channels) if guided else out
        state = sampler.step(out.to(x_t.dtype), state, step, None if step_noise is None else step_noise[step])
    return state.x[: len(noise)]


def _bare(model: Backbone, x: Tensor, t: Tensor, condition) -> Tensor:
    """The output of the whole model at x and timesteps t (N,)."""
    if isinstance(model, DiT):
        return model(x, t, condition)
    (prepared,) = model.prepare(model.embed_timesteps(t[:1]), condition)
    return model.predict(x, prepared)


@contextlib.contextmanager
def unfrozen(model: Backbone) -> Iterator[None]:
    """Within the block all parameters of the model require gradients."""

    def require(gradients: bool) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(gradients)

    require(True)
    try:
        yield
    finally:
        require(False)


def forget_gradients(model: Backbone) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def is_altered(name: str) -> bool:
    """Whether a case compiles or wraps its model, so that it needs one of its own."""
    return name.endswith(("compiled", "recomputed"))


def case(
    name: str, model: Backbone, sampler: Sampler, batch_size: int, cfg_scale: float
) -> Callable[[], object]:
    """The function that runs one case, on random noise on the model's device; see `is_altered`."""
    device, num_steps = model.device, sampler.num_steps
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch_size, *model.sample_shape, generator=generator).to(device)
    if sampler.adds_noise:
        rows = batch_size * halves(model, cfg_scale)
        step_noise = torch.randn(num_steps, rows, *model.sample_shape, generator=generator).to(device)
        sampler = WithNoise(sampler, step_noise)
    labels = (torch.arange(batch_size) % model.num_classes).to(device)
    router = Router(num_steps, model.num_branches, generator).to(device)
    optimizer = torch.optim.AdamW(router.parameters(), fused=True)
    table = fora_schedule(num_steps, model.num_branches, 2).compute
    setting = noise, labels, cfg_scale

    if name in COMPILED:
        compile_branches(model, device)
    if name.endswith("recomputed"):
        recompute_branches(model)

    def update() -> None:
        ones = torch.ones(num_steps, device=device)
        for _ in train_trajectory(model, sampler, router, optimizer, *setting, THRESHOLD, ones, REG_WEIGHT):
            forget_gradients(model)  # nothing where it is frozen

    def update_unfrozen() -> None:
        with unfrozen(model):
            update()

    def end_to_end() -> None:
        reference = ReferenceTrajectory.draw(model, sampler, *setting)
        weights = torch.tensor([1.0, 0.1, -0.1], device=device)
        weights = weights.repeat(num_steps, model.num_branches, 1).requires_grad_()
        cache = GatedCache(table.to(noise), weights)
        reference.errors(cache, recompute=name == "end-to-end")[0].mean().log().backward()

    def search() -> None:
        reference = ReferenceTrajectory.draw(model, sampler, *setting)
        weights = torch.tensor([1.0, 0.1, -0.1], device=device).repeat(num_steps, model.num_branches, 1)
        toggle_effects(reference, table, weights, False, [generator] * batch_size, recompute=True)

    if name == "forward":
        return lambda: plain_loop(model, sampler, labels, noise, cfg_scale)
    if name.startswith("update"):
        return update_unfrozen if name.endswith("backbone gradients") else update
    if name == "refresh":
        return lambda: image_error_proxy(model, sampler, router, *setting, THRESHOLD)
    return search if name == "end-to-end, search" else end_to_end


@dataclass(frozen=True)
class Costs:
    """What is measured. batch_size: trajectories. compile: also the compiled cases. cases: None: all."""

    model: ModelSettings
    sampling: SamplingSettings
    device: torch.device
    dtype: torch.dtype
    batch_size: int = 8
    repeats: int = 5
    compile: bool = False
    cases: Sequence[str] | None = None

    def load(self) -> tuple[Backbone, Sampler]:
        model, _ = self.model.load(self.device, self.dtype)
        return model, self.sampling.trajectory(model, self.sampling.chain(model)).sampler


def training_rows(costs: Costs) -> list[dict]:
    """One row per case: seconds, forward passes, and the most memory on top of the model's.

    `forward` is always among them.
    """
    shared = costs.load()
    num_steps, sizes = shared[1].num_steps, (costs.batch_size, costs.sampling.cfg_scale)
    names = (*CASES, *(COMPILED if costs.compile else ()))
    names = [name for name in names if name == "forward" or not costs.cases or name in costs.cases]
    runs = [case(name, *(costs.load() if is_altered(name) else shared), *sizes) for name in names]
    seconds = alternating(runs, costs.repeats, costs.device)
    seconds = dict(zip(names, map(statistics.median, seconds), strict=True))
    forward, rows = seconds["forward"] / num_steps, []
    for name in names:
        own = seconds[name]
        row = {"case": name, "num_steps": num_steps, "batch_size": sizes[0], "trajectory_seconds": own}
        if name.startswith("update"):  # its first step is a forward without an update
            row["forwards"] = (own - forward) / (num_steps - 1) / forward
        elif name == "refresh":
            row["of_naive"] = own / (num_steps * seconds["forward"])
        else:
            row["forwards"] = own / seconds["forward"]
        row["peak_mb_on_top"] = _memory(costs, name) / 2**20
        rows.append(row)
    return rows


def _memory(costs: Costs, name: str) -> int:
    """Bytes that a case needs on top of the model. For RAM only a fresh process can tell."""
    if costs.device.type == "cuda":
        return _measure_memory(costs, name)
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # freed large tensors are returned at once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # each process begins with the imports behind it
    with context.Pool(1) as pool:
        return pool.apply(_measure_memory, (costs, name))


def _measure_memory(costs: Costs, name: str) -> int:
    run, device = case(name, *costs.load(), costs.batch_size, costs.sampling.cfg_scale), costs.device
    if name in COMPILED:
        run()  # the compiler's own memory does not count
    reset_peak_memory(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory(device)
    run()
    return peak_memory(device) - before
