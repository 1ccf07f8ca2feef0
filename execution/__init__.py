"""The same numbers, faster: compiled branches, CUDA graphs, quantised weights, kernels."""

from functools import partial

import torch

from backbones.contract import Backbone
from cache import combined
from execution.compilation import compile_branches, fuse, recompute_branches
from execution.graphs import Captured
from execution.quantization import quantize
from execution.settings import ExecutionSettings
from models import DiT
from sampling.loop import Sample, sample

__all__ = [
    "Captured",
    "ExecutionSettings",
    "compile_branches",
    "fuse",
    "prepare",
    "quantize",
    "recompute_branches",
]


def prepare(settings: ExecutionSettings, model: Backbone, device: torch.device) -> Sample:
    """Quantise and compile `model` in place; returns what stands for `sampling.sample`.

    Raises ValueError where the device or the installation cannot do what `settings` ask for.
    """
    settings = settings.on(device)
    if settings.quantize:
        quantize(model, settings.quantize, device)
    if settings.compile:
        if device.type == "cuda" and isinstance(model, DiT):
            fuse(model, settings.quantize)
        compile_branches(model, device)
    combine = torch.compile(combined, dynamic=False) if settings.compile else None
    if settings.cuda_graph:
        return Captured(settings.stored_dtype, combine)
    return partial(sample, cache_dtype=settings.stored_dtype, combine=combine)
