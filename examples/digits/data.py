"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels in 17 grey levels, ten classes.

The library ships the data (UCI "Optical Recognition of Handwritten Digits", test part), so nothing is
downloaded.
"""

import numpy as np
import torch
from torch import Tensor

NUM_CLASSES = 10


def digit_images() -> tuple[Tensor, Tensor]:
    """All images (1797, 1, 8, 8) in [-1, 1] and their labels (1797,)."""
    from sklearn.datasets import load_digits  # slow to import, and few commands read images

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8.0 - 1.0
    return images, torch.from_numpy(digits.target).long()


def train_test_indices(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A fixed random split into four fifths and one fifth: index tensors (1438,) and (359,)."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(1797))
    return order[359:], order[:359]
