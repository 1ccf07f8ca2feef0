"""How far reuse moves the mean and the variance of the images: a formula, and its value over all ranks.

Least squares shrinks predictions towards their mean, so images of the smallest squared error vary too little.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def moment_error(
    before: Tensor,
    after: Tensor,
    importance: Tensor,
    centre: Tensor,
    variance: Tensor,
    count: int,
    square: Callable[[Tensor], Tensor] = torch.square,
) -> Tensor:
    """`count * (mean(shift of the mean image ^ 2) + (change of the variance)^2 / variance)`, 0-dim.

    before, after: (n, d) uncached samples and the same ones under a cache. importance: (n, 1), the weight of
    each sample in a mean. centre: (d,), the uncached mean image. variance: 0-dim, the mean squared distance
    of uncached elements from it. count: samples that the means are over; errors that samples do not share
    then add about their own mean square, whatever the count is. square: of a mean over samples.
    """
    shift = (importance * (after - before)).mean(0)  # (d,)
    gained = importance * ((after - centre).square() - (before - centre).square())  # (n, d)
    return count * (square(shift).mean() + square(gained.mean()) / variance.clamp(min=1e-12))


def moment_error_over_ranks(
    before: Tensor, after: Tensor, importance: Tensor, count: int, reduce: Reduce
) -> Tensor:
    """`moment_error` of the samples of all ranks, whose mean `reduce` takes; n samples are this rank's.

    The mean of the result over ranks is the moment error, and its gradient is that of this rank's samples, to
    be averaged like every other gradient.
    """
    centre = reduce((importance * before).mean(0))
    variance = reduce((importance * (before - centre).square()).mean())
    square = partial(_square_of_mean, reduce=reduce)
    return moment_error(before, after, importance, centre, variance, count, square)


def _square_of_mean(own: Tensor, reduce: Reduce) -> Tensor:
    """The square of the mean of all ranks' `own`: the mean over ranks has this value and this gradient."""
    mean = reduce(own.detach().clone())
    return 2 * own * mean - mean.square()
