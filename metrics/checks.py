"""Checks for finite numbers: a metric of NaN or infinity could look like any other number."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def require_finite_weights(state: object, path: str | Path) -> None:
    """Raise ValueError where a tensor of a state dict, read from `path`, holds NaN or infinity."""
    for name, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, Tensor) and not torch.isfinite(value).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity; fetch the file again")


def require_finite(values: Tensor | np.ndarray, what: str, first: int = 0) -> None:
    """Raise ValueError where `values` (n, ...) holds NaN or infinity, naming the first such of the n.

    what: the values' name in the message. first: the number of values[0] in the whole set.
    """
    finite = torch.isfinite(torch.as_tensor(values))
    if finite.all():
        return
    if not finite.ndim:
        raise ValueError(f"{what} is not finite: {values}")
    number = int((~finite.flatten(1).all(dim=1) if finite.ndim > 1 else ~finite).nonzero()[0])
    raise ValueError(f"{what} hold NaN or infinity, the first in number {first + number}")
