"""How far cached samples are from the uncached model's, drawn from the same noise."""

import math

import torch
from torch import Tensor


def mse(samples: Tensor, reference: Tensor) -> float:
    """Mean squared error per element, summed in float64."""
    return (samples.double() - reference.double()).square().mean().item()


def psnr(samples: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two sets of uint8 images, from their overall MSE; inf if equal."""
    assert samples.dtype == reference.dtype == torch.uint8
    error = mse(samples, reference)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
