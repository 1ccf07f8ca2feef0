"""Multiply-accumulates of diffusers' transformers, counted on the meta device: no weight, no computation."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.families import Branch, find_branches


def count_macs(transformer: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """(of each branch, of everything else) in one forward pass of `inputs`, for one sample of its batch.

    Matrix products, convolutions and attention count, as in `models.DiT`; one multiply-accumulate is two of
    the counter's operations.
    """
    batch = len(inputs["hidden_states"])
    shadow = on_meta(transformer)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(**{name: _to_meta(value) for name, value in inputs.items()}, return_dict=False)
    counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    root = type(transformer).__name__
    branches = tuple(
        sum(counts.get(f"{root}.{path}", 0) for path in paths_of(branch)) // (2 * batch)
        for branch in find_branches(transformer)
    )
    return branches, counter.get_total_flops() // (2 * batch) - sum(branches)


def paths_of(branch: Branch) -> list[str]:
    """The modules that a reused branch leaves out, by their path in the transformer."""
    block = branch.name.rpartition(".")[0]
    return [branch.name, *(f"{block}.{feeder}" for feeder in branch.spec.feeders)]


def on_meta(transformer: nn.Module) -> nn.Module:
    """A model of the same configuration without weights or hooks."""
    with torch.device("meta"):
        return type(transformer).from_config(copy.deepcopy(dict(transformer.config))).eval()


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta")
    if isinstance(value, Mapping):
        return {name: _to_meta(one) for name, one in value.items()}
    return value
