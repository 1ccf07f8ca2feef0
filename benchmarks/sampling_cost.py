"""The cost of sampling, for `benchmark.py`: a card of theory and ceilings, then timings of methods."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backbones.contract import Backbone
from backbones.denoiser import halves
from benchmarks.training_cost import plain_loop
from common.pictures import branch_types
from common.timing import alternating, copy_ceiling, latency, matmul_ceiling, peak_memory, reset_peak_memory
from execution.quantization import branch_weight_bytes, weight_bytes
from execution.settings import ExecutionSettings
from metrics.paired import mse
from sampling.decoding import require_finite
from sampling.loop import Sample, draw_step_noise
from sampling.settings import SamplingSettings
from schedules.methods import Method

LOOP = "loop"  # calls the bare model step by step


class Setting(NamedTuple):
    """All that the rows share. sample: the result of `execution.prepare` for the model."""

    model: Backbone
    sample: Sample
    execution: ExecutionSettings
    device: torch.device
    repeats: int


def card(
    model: Backbone, device: torch.device, batch: int, cfg_scale: float, quantization: str | None = None
) -> dict:
    """Facts that are known before any method is timed, and two measured ceilings of the device.

    model: as it is before it is quantised. The matmul ceiling is measured in the model's dtype; products in 8
    bits can surpass it.
    """
    rows, dtype = batch * halves(model, cfg_scale), model.dtype
    width = _width(model)
    firsts = {
        kind: next(k for k, name in enumerate(model.branches) if name.endswith(f".{kind}"))
        for kind in branch_types(model.branches)
    }
    of_branch = [bytes / 2**20 for bytes in branch_weight_bytes(model, quantization)]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights_mb": weight_bytes(model, quantization) / 2**20,
        "weights_mb_of_branch": {kind: of_branch[k] for kind, k in firsts.items()},
        "gmacs_per_step": rows * (sum(model.branch_macs) + model.other_macs) / 1e9,
        "gmacs_of_branch": {kind: rows * model.branch_macs[k] / 1e9 for kind, k in firsts.items()},
        "branch_output_mb": rows * model.branch_size * dtype.itemsize / 2**20,
        "matmul_gmacs_per_second": matmul_ceiling(device, dtype, rows * model.branch_size // width, width)
        / 1e9,
        "copy_gb_per_second": copy_ceiling(device) / 1e9,
    }


def _width(model: Backbone) -> int:
    """How many values a token has, as the first branch reads it."""
    return next(one.in_features for one in model.branch_modules[0].modules() if isinstance(one, nn.Linear))


def floor_seconds(facts: dict, macs: float, weights_read: float) -> float:
    """A lower bound on a run's time: all products at the ceiling, or all weights (bytes) once."""
    products = macs / (facts["matmul_gmacs_per_second"] * 1e9)
    return max(products, weights_read / (facts["copy_gb_per_second"] * 1e9))


def sampling_rows(
    setting: Setting, chosen: dict[str, Method], sampling: SamplingSettings, batch: int, facts: dict
) -> list[dict]:
    """One row per method at one batch size and setting of sampling; `none` is one of `chosen`.

    facts: what `card` returns. Without a compiler and a CUDA graph there is one row more, `loop`.
    """
    model, device, executing = setting.model, setting.device, setting.execution
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, *model.sample_shape, generator=generator).to(device)
    labels = (torch.arange(batch) % model.num_classes).to(device)

    def seeded() -> torch.Generator:  # for the noise that some samplers add, the same in every run
        return torch.Generator().manual_seed(1)

    def runner(method: Method) -> Callable[[], Tensor]:
        trajectory = method.trajectory(model, sampling)
        return lambda: setting.sample(trajectory, labels, noise, seeded())

    def loop() -> Tensor:
        plain = chosen["none"].trajectory(model, sampling)
        step_noise = draw_step_noise(plain, noise, seeded())
        return plain_loop(model, plain.sampler, labels, noise, sampling.cfg_scale, step_noise)

    runs = {name: runner(method) for name, method in chosen.items()}
    if not executing.compile and not executing.cuda_graph:
        runs[LOOP] = loop
    x_0, peaks = {}, {}
    for name, run in runs.items():  # the warm-up, which captures where it does
        reset_peak_memory(device)
        x_0[name] = run()
        require_finite(x_0[name], what=f"x_0 of {name}")
        peaks[name] = peak_memory(device)
    times = dict(zip(runs, alternating(list(runs.values()), setting.repeats, device, warm_up=0), strict=True))
    passes, rows = halves(model, sampling.cfg_scale), []
    weights = torch.tensor(branch_weight_bytes(model, executing.quantize), dtype=torch.float64)
    for name in runs:
        method = chosen.get(name, chosen["none"])
        schedule, steps = method.schedule, method.diffusion.num_timesteps
        full = steps * (sum(model.branch_macs) + model.other_macs)
        macs = batch * passes * (full if schedule is None else schedule.macs(model))
        seconds = statistics.median(times[name])
        row = {"method": name, "num_steps": steps, "batch_size": batch}
        row |= latency(times[name], times["none"])
        row["speedup_macs"] = method.speedup_macs(model, chosen["none"].diffusion.num_timesteps)
        row["ratio"] = row["speedup_latency"] / row["speedup_macs"]
        row["of_ceiling"] = macs / seconds / (facts["matmul_gmacs_per_second"] * 1e9)
        read = steps * weights.sum() if schedule is None else (schedule.computed() @ weights).sum()
        row["floor_ms"] = 1000 * floor_seconds(facts, macs, read.item())
        row["cache_mb"] = cache_bytes(model, method, batch * passes, executing.stored_dtype) / 2**20
        if device.type == "cuda":  # on a CPU it is the whole process's and says nothing about one method
            row["peak_mb"] = peaks[name] / 2**20
        rows.append(row)
    if LOOP in x_0:
        rows[0]["mse_to_loop"] = mse(x_0["none"], x_0[LOOP])
    return rows


def cache_bytes(model: Backbone, method: Method, rows: int, stored_dtype: torch.dtype | None = None) -> int:
    """The most bytes that stored branch outputs of `rows` samples take at once."""
    if method.schedule is None:
        return 0
    dtype = stored_dtype or model.dtype
    return method.schedule.stored_outputs() * rows * model.branch_size * dtype.itemsize
