"""Noise and labels of every sample from the seed and its number alone."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from backbones.contract import Backbone

# Streams of randomness that never meet, whatever the seed.
SAMPLING_STREAM, TRAINING_STREAM, DATA_STREAM, CALIBRATION_STREAM = 0, 1, 2, 3


def sample_generator(seed: int, stream: int, *key: int) -> torch.Generator:
    """A CPU generator for one sample, from the seed, the stream's number and the sample's key within it."""
    state = np.random.SeedSequence(seed, spawn_key=(stream, *key)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def draw_noise(model: Backbone, generators: Sequence[torch.Generator]) -> Tensor:
    """Noise (n, C, H, W) on the CPU, one sample from each generator."""
    return torch.stack([torch.randn(model.sample_shape, generator=generator) for generator in generators])


def draw_labels(model: Backbone, generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform random labels (n,) on the CPU, one from each generator."""
    return torch.stack(
        [torch.randint(model.num_classes, (), generator=generator) for generator in generators]
    )
