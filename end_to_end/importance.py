"""Drawing samples in proportion to their part in a mean that few samples decide.

The mean squared error of x_0 is such a mean: a small error of the early steps carries a sample near the
boundary between two images over it, and that sample then counts as much as thousands of others. Batches that
are drawn uniformly hardly ever hold one.
"""

import torch
from torch import Tensor

BY_SIZE = 0.25  # a larger share serves the few large samples at the cost of all others


def inclusion(sizes: Tensor, n: int, by_size: float = BY_SIZE) -> Tensor:
    """Probabilities (P,) of being among the n drawn: a share in proportion to size, the rest even.

    They sum to n and none is above 1. sizes: (P,), not negative; n is at most P. by_size: the share.
    """
    mean = sizes.mean()
    relative = sizes.double() / mean if mean > 0 else torch.ones_like(sizes, dtype=torch.float64)
    worth = by_size * relative + (1 - by_size)
    certain = torch.zeros_like(worth, dtype=torch.bool)
    while True:
        rest = worth * ~certain
        probabilities = torch.where(certain, 1.0, rest * ((n - certain.sum()) / rest.sum().clamp(min=1e-300)))
        beyond = (probabilities > 1 - 1e-12) & ~certain  # rounding may leave a certain one below 1
        if not beyond.any():
            return probabilities
        certain |= beyond


def systematic_sample(probabilities: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n different indices and the importance of each, its weight in their mean, both (n,).

    mean(importance * value[indices]) has the expectation mean(value), whatever the value.
    """
    n = round(probabilities.sum().item())
    order = torch.randperm(len(probabilities), generator=generator)
    passed = probabilities[order].cumsum(0)
    ticks = torch.arange(n) + torch.rand((), generator=generator, dtype=torch.float64)
    indices = order[torch.searchsorted(passed, ticks).clamp(max=len(order) - 1)]
    return indices, (n / len(probabilities) / probabilities[indices]).float()
