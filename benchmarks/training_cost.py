"""What router training costs, for `benchmark.py --train`: in forward passes of the bare model, and in memory.

| case | what runs |
|---|---|
| `forward` | `model.forward_with_cfg` at every step of a trajectory |
| `update` | a trajectory of step-wise denoising training (SDT), T - 1 updates of a row |
| `update, backbone gradients` | the same with a model that is not frozen, as in the released code |
| `update, branches recomputed` | the same with `--recompute-branches` |
| `update, compiled` (with `--compile`) | the same with `--compile` |
| `update, compiled, branches recomputed` (with `--compile`) | the same with both |
| `refresh` | lambda by the image error proxy; the naive way is T trajectories |
| `end-to-end` | an update of end-to-end training at half of the MACs, activations recomputed |
| `end-to-end, kept` | the same, activations of all steps kept |
| `end-to-end, search` | the most of a step of its search: all cells' effects, activations recomputed |
"""

import argparse
import contextlib
import copy
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from backbones.loading import load_model
from cache import GatedCache
from common.timing import alternating, peak_memory, reset_peak_memory
from diffusion import GaussianDiffusion, create_diffusion
from end_to_end.trajectory import ReferenceTrajectory, toggle_effects
from execution import compile_branches, recompute_branches
from models import DiT
from objectives import image_error_proxy, train_trajectory
from router import Router
from schedules.baselines import fora_schedule

THRESHOLD, REG_WEIGHT = 0.1, 1e-7
CASES = (
    "forward", "update", "update, backbone gradients", "update, branches recomputed", "refresh",
    "end-to-end", "end-to-end, kept", "end-to-end, search",
)  # fmt: skip
COMPILED = ("update, compiled", "update, compiled, branches recomputed")


def plain_loop(
    model: DiT, diffusion: GaussianDiffusion, labels: Tensor, noise: Tensor, cfg_scale: float
) -> Tensor:
    """DDIM with nothing taken out of the loop: the bare model, called at every step. Returns x_0."""
    guided = cfg_scale != 1
    y, x_t = model.condition(labels, guided), torch.cat([noise, noise]) if guided else noise
    with torch.no_grad():
        for step in reversed(range(diffusion.num_timesteps)):
            setting = x_t.to(model.dtype), diffusion.timesteps(step, len(x_t), x_t.device), y
            out = model.forward_with_cfg(*setting, cfg_scale) if guided else model(*setting)
            x_t = diffusion.ddim_step(out.to(x_t.dtype), x_t, step)
    return x_t[: len(noise)]


@contextlib.contextmanager
def unfrozen(model: DiT) -> Iterator[None]:
    """All parameters require gradients, those of timestep and label too."""
    model.requires_grad_(True)
    try:
        yield
    finally:
        model.requires_grad_(False)


def case(
    name: str, model: DiT, diffusion: GaussianDiffusion, batch_size: int, cfg_scale: float
) -> Callable[[], object]:
    """What is run of one case, on random noise and the model's device."""
    device, num_steps = next(model.parameters()).device, diffusion.num_timesteps
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, model.in_channels, model.input_size, model.input_size)
    noise = torch.randn(shape, generator=generator).to(device)
    labels = (torch.arange(batch_size) % model.num_classes).to(device)
    router = Router(num_steps, model.num_branches, generator).to(device)
    optimizer = torch.optim.AdamW(router.parameters(), fused=True)
    table = fora_schedule(num_steps, model.num_branches, 2).compute
    setting = noise, labels, cfg_scale

    model = copy.deepcopy(model) if name.endswith(("compiled", "recomputed")) else model
    if name in COMPILED:
        compile_branches(model, device)
    if name.endswith("recomputed"):
        recompute_branches(model)

    def update() -> None:
        ones = torch.ones(num_steps, device=device)
        for _ in train_trajectory(model, diffusion, router, optimizer, *setting, THRESHOLD, ones, REG_WEIGHT):
            model.zero_grad()  # nothing where it is frozen

    def update_unfrozen() -> None:
        with unfrozen(model):
            update()

    def end_to_end() -> None:
        reference = ReferenceTrajectory.draw(model, diffusion, *setting)
        weights = torch.tensor([1.0, 0.1, -0.1], device=device)
        weights = weights.repeat(num_steps, model.num_branches, 1).requires_grad_()
        cache = GatedCache(table.to(noise), weights)
        reference.errors(cache, recompute=name == "end-to-end")[0].mean().log().backward()

    def search() -> None:
        reference = ReferenceTrajectory.draw(model, diffusion, *setting)
        weights = torch.tensor([1.0, 0.1, -0.1], device=device).repeat(num_steps, model.num_branches, 1)
        toggle_effects(reference, table, weights, False, [generator] * batch_size, recompute=True)

    if name == "forward":
        return lambda: plain_loop(model, diffusion, labels, noise, cfg_scale)
    if name.startswith("update"):
        return update_unfrozen if name.endswith("backbone gradients") else update
    if name == "refresh":
        return lambda: image_error_proxy(model, diffusion, router, *setting, THRESHOLD)
    return search if name == "end-to-end, search" else end_to_end


def training_rows(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """One row per case of `args.cases`: seconds, forward passes, and the most memory on top of the model.

    `forward` is always among them; by default all are, the compiled ones with `args.compile`.
    """
    model, diffusion = _setup(args, device, dtype)
    num_steps = diffusion.num_timesteps
    sizes = args.batch_size[0], args.cfg_scale
    names = (*CASES, *(COMPILED if args.compile else ()))
    names = [name for name in names if name == "forward" or not args.cases or name in args.cases]
    runs = [case(name, model, diffusion, *sizes) for name in names]
    seconds = dict(zip(names, map(statistics.median, alternating(runs, args.repeats, device)), strict=True))
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
        row["peak_mb_on_top"] = _memory(args, name, device, dtype) / 2**20
        rows.append(row)
    return rows


def _setup(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple:
    model = load_model(
        args.model, image_size=args.image_size, device=device, dtype=dtype, random_weights=True
    )
    return model, create_diffusion(args.num_sampling_steps[0], learn_sigma=model.learn_sigma)


def _memory(args: argparse.Namespace, name: str, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that a case needs on top of the model; of RAM they can be told in a fresh process alone."""
    if device.type == "cuda":
        return _measure_memory(args, name, device, dtype)
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # what large tensors leave goes back at once
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_memory, (args, name, device, dtype))


def _measure_memory(args: argparse.Namespace, name: str, device: torch.device, dtype: torch.dtype) -> int:
    run = case(name, *_setup(args, device, dtype), args.batch_size[0], args.cfg_scale)
    if name in COMPILED:
        run()  # what the compiler needs is not the update's
    reset_peak_memory(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory(device)
    run()
    return peak_memory(device) - before
