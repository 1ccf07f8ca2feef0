"""Frechet distance between two sets of features (Heusel et al. 2017, eq. 6), in float64."""

import numpy as np

from metrics.checks import require_finite

# Share of a covariance's size by which rounding in float32 may break its symmetry or leave eigenvalues below
# zero; more is no covariance.
ROUNDING = 1e-5


class RunningStatistics:
    """Mean and unbiased covariance of features that come in batches; memory (D, D), whatever their number.

    It sums differences from the mean of the first batch, so a large common offset costs no precision.
    """

    def __init__(self):
        self.count = 0
        self._offset = self._sum = self._products = None

    def update(self, features: np.ndarray) -> None:
        """Take in features (n, D). Raises ValueError for another shape, NaN and infinity."""
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or (self.count and features.shape[1] != len(self._offset)):
            raise ValueError(f"features of shape {features.shape} are not (n, D), D as before")
        require_finite(features, "features", self.count)
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


def check_statistics(
    mean: np.ndarray, covariance: np.ndarray, names: tuple[str, str] = ("mean", "covariance")
) -> tuple[np.ndarray, np.ndarray]:
    """A mean (D,) and a covariance (D, D) in float64.

    Raises ValueError, with these names, unless they are real, finite and fit, and the covariance is symmetric
    and positive semi-definite up to rounding.
    """
    pair = np.asarray(mean), np.asarray(covariance)
    for name, array in zip(names, pair, strict=True):
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{name} is {array.dtype}; real numbers are needed")
    mean, covariance = (array.astype(np.float64) for array in pair)
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{' and '.join(names)} of shapes {mean.shape} and {covariance.shape} do not fit")
    for name, array in zip(names, (mean, covariance), strict=True):
        if bad := array.size - np.count_nonzero(np.isfinite(array)):
            raise ValueError(f"{name} holds {bad} of {array.size} values that are not finite")
    asymmetry, largest = np.abs(covariance - covariance.T).max(), np.abs(covariance).max()
    if asymmetry > ROUNDING * largest:
        raise ValueError(
            f"{names[1]} is not symmetric: two halves differ by {asymmetry:.3g} of {largest:.3g}"
        )
    if not _is_positive(covariance):
        values = np.linalg.eigvalsh(covariance)
        raise ValueError(
            f"{names[1]} is no covariance: its eigenvalues reach from {values[0]:.3g} to {values[-1]:.3g}"
        )
    return mean, covariance


def _is_positive(covariance: np.ndarray) -> bool:
    """Whether no eigenvalue is below zero by more than rounding, without computing them, which is slow."""
    shift = ROUNDING * np.linalg.norm(covariance)
    if shift == 0:
        return True
    try:
        np.linalg.cholesky(covariance + shift * np.eye(len(covariance)))
    except np.linalg.LinAlgError:
        return False
    return True


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """`|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))`, at least 0.

    The trace of the root is the sum of the singular values of `sigma1^(1/2) sigma2^(1/2)`, which needs no
    matrix root of a non-symmetric product and stays real where a covariance is singular. Raises ValueError
    for what `check_statistics` refuses, and where no finite distance comes out.
    """
    mu1, sigma1 = check_statistics(mu1, sigma1, ("mu1", "sigma1"))
    mu2, sigma2 = check_statistics(mu2, sigma2, ("mu2", "sigma2"))
    if len(mu1) != len(mu2):
        raise ValueError(f"means of {len(mu1)} and {len(mu2)} values have no distance")
    (root1, variance1), (root2, variance2) = _root_and_trace(sigma1), _root_and_trace(sigma2)
    cross = np.linalg.svd(root1 @ root2, compute_uv=False).sum()
    distance = float(np.sum((mu1 - mu2) ** 2) + variance1 + variance2 - 2 * cross)
    if not np.isfinite(distance) or distance < -ROUNDING * (variance1 + variance2):
        raise ValueError(f"the Frechet distance came out as {distance}; the statistics are out of range")
    return max(0.0, distance)  # rounding can leave equal sets just below zero


def _root_and_trace(covariance: np.ndarray) -> tuple[np.ndarray, float]:
    """Square root and trace of a covariance; eigenvalues that rounding left below zero count as zero."""
    values, vectors = np.linalg.eigh(covariance)
    values = values.clip(min=0)
    return (vectors * np.sqrt(values)) @ vectors.T, float(values.sum())
