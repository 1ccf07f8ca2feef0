"""How far cached samples are from the uncached model's, drawn from the same noise."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.checks import require_finite


def mse(samples: Tensor, reference: Tensor) -> float:
    """Mean squared error per element, summed in float64. Raises ValueError unless it is finite."""
    if samples.shape != reference.shape or not samples.numel():
        raise ValueError(f"samples {tuple(samples.shape)} and {tuple(reference.shape)} are no pairs")
    error = (samples.double() - reference.double()).square().mean().item()
    if not math.isfinite(error):
        require_finite(samples, "samples")
        require_finite(reference, "samples to compare with")
        raise ValueError(f"the mean squared error came out as {error}; the samples are out of range")
    return error


def _require_images(samples: Tensor, reference: Tensor) -> None:
    if not samples.dtype == reference.dtype == torch.uint8:
        raise ValueError(f"images are {samples.dtype} and {reference.dtype}; uint8 is needed")
    if samples.shape != reference.shape or not samples.numel():
        raise ValueError(f"images {tuple(samples.shape)} and {tuple(reference.shape)} are no pairs")


def psnr(samples: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two sets of uint8 images, from their overall MSE; inf if equal."""
    _require_images(samples, reference)
    error = mse(samples, reference)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(samples: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (n,) of uint8 images (n, H, W, C), 1 where equal (Wang et al. 2004).

    A Gaussian window of 11 x 11 pixels and standard deviation 1.5 (smaller where the image is), in float64,
    over the positions where it lies inside the image; the mean over them and over channels.
    """
    _require_images(samples, reference)
    x, y = (images.permute(0, 3, 1, 2).double() for images in (samples, reference))
    n, channels, height, width = x.shape
    side = min(11, height - (height + 1) % 2, width - (width + 1) % 2)  # odd, and inside the image
    distances = torch.arange(side, dtype=torch.float64) - side // 2
    line = torch.exp(-(distances**2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2

    def local_mean(values: Tensor) -> Tensor:
        return F.conv2d(values.reshape(n * channels, 1, height, width), window[None, None])

    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    values = values / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return values.reshape(n, -1).mean(1)
