"""Frechet distance between two sets of features (Heusel et al. 2017, eq. 6), in float64."""

import numpy as np


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of features (n, D)."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


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
