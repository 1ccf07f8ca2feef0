"""What router training costs, in forward passes of the bare model and in memory.

    python benchmark.py --train --model DiT-B/2 --batch-size 2 --num-sampling-steps 10     # all cases

This module holds the cases that `benchmark.py --train` measures:

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
| `end-to-end, kept` | the same with the activations of all steps kept in memory |
| `end-to-end, search` | the main part of a step of its search: effects of all cells, activations recomputed |
"""

import contextlib
import copy
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
    """DDIM with the bare model called at every step and nothing precomputed. Returns x_0 (n, C, H, W)."""
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
    """Within the block all parameters of the model require gradients."""
    model.requires_grad_(True)
    try:
        yield
    finally:
        model.requires_grad_(False)


def case(
    name: str, model: DiT, diffusion: GaussianDiffusion, batch_size: int, cfg_scale: float
) -> Callable[[], object]:
    """The function that runs one case, on random noise on the model's device."""
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


@dataclass(frozen=True)
class Costs:
    """What is measured. batch_size: trajectories. compile: also the compiled cases. cases: None: all."""

    model: str
    device: torch.device
    dtype: torch.dtype
    image_size: int | None = None
    num_sampling_steps: str = "20"
    batch_size: int = 8
    cfg_scale: float = 4.0
    repeats: int = 5
    compile: bool = False
    cases: Sequence[str] | None = None

    def load(self) -> tuple[DiT, GaussianDiffusion]:
        """The model with random weights, and the chain."""
        model = load_model(
            self.model, image_size=self.image_size, device=self.device, dtype=self.dtype, random_weights=True
        )
        return model, create_diffusion(self.num_sampling_steps, learn_sigma=model.learn_sigma)


def training_rows(costs: Costs) -> list[dict]:
    """One row per case: seconds, forward passes, and the most memory on top of the model's.

    `forward` is always among them.
    """
    model, diffusion = costs.load()
    num_steps = diffusion.num_timesteps
    sizes = costs.batch_size, costs.cfg_scale
    names = (*CASES, *(COMPILED if costs.compile else ()))
    names = [name for name in names if name == "forward" or not costs.cases or name in costs.cases]
    runs = [case(name, model, diffusion, *sizes) for name in names]
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
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_memory, (costs, name))


def _measure_memory(costs: Costs, name: str) -> int:
    run, device = case(name, *costs.load(), costs.batch_size, costs.cfg_scale), costs.device
    if name in COMPILED:
        run()  # the compiler's own memory does not count
    reset_peak_memory(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory(device)
    run()
    return peak_memory(device) - before
