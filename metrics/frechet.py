"""Frechet distance between two sets of features (Heusel et al. 2017, eq. 6), in float64."""

import numpy as np


class RunningStatistics:
    """Mean and unbiased covariance of features that come in batches; memory (D, D), whatever their number.

    Sums are of differences to the mean of the first batch, so that a large common offset costs no digits.
    """

    def __init__(self):
        self.count = 0
        self._offset = self._sum = self._products = None

    def update(self, features: np.ndarray) -> None:
        """Take in features (n, D)."""
        features = np.asarray(features, dtype=np.float64)
        if self._offset is None:
            dimension = features.shape[1]
            self._offset = features.mean(axis=0)
            self._sum, self._products = np.zeros(dimension), np.zeros((dimension, dimension))
        centred = features - self._offset
        self.count += len(centred)
        self._sum += centred.sum(axis=0)
        self._products += centred.T @ centred

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and covariance (D, D). Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"{self.count} samples have no covariance; give at least 2")
        mean = self._sum / self.count
        covariance = (self._products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return self._offset + mean, covariance


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of features (n, D)."""
    running = RunningStatistics()
    running.update(features)
    return running.finish()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """`|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))`.

    The trace of the root is the sum of the singular values of `sigma1^(1/2) sigma2^(1/2)`, which needs no
    matrix root of a non-symmetric product and stays real where a covariance is singular.
    """
    cross = np.linalg.svd(_symmetric_root(sigma1) @ _symmetric_root(sigma2), compute_uv=False).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(0.0, float(distance))  # rounding can leave equal sets just below zero


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
