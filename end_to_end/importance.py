"""Samples drawn in proportion to what they are worth to a mean that few of them decide.

The mean squared error of x_0 is such a mean: a sample near the boundary between two images is carried over it
by a small error of its early steps, and then counts as much as thousands of others. Batches of uniformly
drawn samples hardly ever hold one.
"""

import torch
from torch import Tensor

BY_SIZE = 0.25  # more serves the few large ones, and costs all others


def inclusion(sizes: Tensor, n: int, by_size: float = BY_SIZE) -> Tensor:
    """Probabilities (P,) of being among the n drawn: a share in proportion to size, the rest even.

    They sum to n and none is above 1. sizes: (P,), not negative; n is at most P.
    """
    mean = sizes.mean()
    relative = sizes.double() / mean if mean > 0 else torch.ones_like(sizes, dtype=torch.float64)
    worth = by_size * relative + (1 - by_size)
    certain = torch.zeros_like(worth, dtype=torch.bool)
    while True:
        rest = worth * ~certain
        probabilities = torch.where(certain, 1.0, rest * ((n - certain.sum()) / rest.sum().clamp(min=1e-300)))
        beyond = (probabilities > 1 - 1e-12) & ~certain  # what rounding leaves below 1 is certain, too
        if not beyond.any():
            return probabilities
        certain |= beyond


def systematic_sample(probabilities: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n different indices, and what each weighs in their mean, (n,) both.

    mean(weights * value[indices]) has the expectation mean(value), whatever the value.
    """
    n = round(probabilities.sum().item())
    order = torch.randperm(len(probabilities), generator=generator)
    passed = probabilities[order].cumsum(0)
    ticks = torch.arange(n) + torch.rand((), generator=generator, dtype=torch.float64)
    indices = order[torch.searchsorted(passed, ticks).clamp(max=len(order) - 1)]
    return indices, (n / len(probabilities) / probabilities[indices]).float()
