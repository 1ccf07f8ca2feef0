"""Feature extractors: they turn uint8 images into the numbers that FID, sFID, IS and the others compare.

| name | pool | spatial | probabilities |
|---|---|---|---|
| `inception` | 2048, last pool | first 7 channels of the mixed_6 convolution, 7 * 17 * 17 | 1008 classes |
| an example's, such as its judge's | of its own | - | its classes |
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common import registry
from common.files import load_pickle_safely
from metrics.checks import require_finite_weights

SPATIAL_CHANNELS = 7
WEIGHTS_SOURCE = "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's v0.2.0 release"


class Features(NamedTuple):
    """Features of n images in float32: pool (n, D), spatial (n, S) or None, probabilities (n, classes)."""

    pool: Tensor
    spatial: Tensor | None
    probabilities: Tensor


Extractor = Callable[[Tensor], Features]


def load_extractor(name: str, weights: str | None = None, device: torch.device | str = "cpu") -> Extractor:
    """`inception` (with its weights file) or an example's, as a function of uint8 images (n, H, W, C)."""
    if name == "inception":
        return InceptionFeatures(weights, device)
    own = registry.features()
    if name not in own:
        raise ValueError(f"--features {name} is unknown; choose inception or {' or '.join(own)}")
    return own[name]()


class InceptionFeatures:
    """The Inception network of the ADM protocol: TensorFlow's of 2015, as torch-fidelity ported it.

    Raises FileNotFoundError or ValueError where its weights or the package are missing.
    """

    def __init__(self, weights: str | Path | None, device: torch.device | str = "cpu"):
        if weights is None or not Path(weights).is_file():
            given = (
                "--features inception needs its weights" if weights is None else f"{weights} does not exist"
            )
            raise FileNotFoundError(f"{given}; give --inception-weights, {WEIGHTS_SOURCE}")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise ValueError(
                "--features inception needs torch-fidelity: pip install torch-fidelity"
            ) from None
        state = load_pickle_safely(Path(weights))  # refuses what torch-fidelity would execute
        require_finite_weights(state, weights)
        try:
            self._network = FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
            ).to(device)
        except (RuntimeError, TypeError, AttributeError):
            raise ValueError(f"{weights} does not hold this Inception; give {WEIGHTS_SOURCE}") from None
        self._device, self._spatial = device, None
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, _module, _inputs, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        colour = images.expand(*images.shape[:3], 3)  # grey images in three equal channels
        pool, logits = self._network(colour.permute(0, 3, 1, 2).to(self._device))
        # Rows, columns, channels: the order of the reference statistics.
        spatial = self._spatial.permute(0, 2, 3, 1).flatten(1)
        return Features(pool.cpu(), spatial.float().cpu(), logits.softmax(dim=1).cpu())
