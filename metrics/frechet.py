"""Frechet distance between two sets of features (Heusel et al. 2017, eq. 6), in float64."""

import numpy as np

from metrics.checks import require_finite

# Share of a covariance's size by which rounding in float32 may break its symmetry or leave eigenvalues below
# zero; more is no covariance.
ROUNDING = 1e-5


class RunningStatistics:
    """Mean and unbiased covariance of features that come in batches; memory (D, D), whatever their number.

    Sums are of differences to the mean of the first batch, so that a large common offset costs no digits.
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
) -> None:
    """Raise ValueError unless these are a mean (D,) and a covariance (D, D): real, finite, symmetric and
    positive semi-definite up to rounding."""
    _covariance_spectrum(mean, covariance, names)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """`|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))`, at least 0.

    The trace of the root is the sum of the singular values of `sigma1^(1/2) sigma2^(1/2)`, which needs no
    matrix root of a non-symmetric product and stays real where a covariance is singular. Raises ValueError
    for what `check_statistics` refuses, and where no finite distance comes out.
    """
    values1, vectors1 = _covariance_spectrum(mu1, sigma1, ("mu1", "sigma1"))
    values2, vectors2 = _covariance_spectrum(mu2, sigma2, ("mu2", "sigma2"))
    if len(mu1) != len(mu2):
        raise ValueError(f"means of {len(mu1)} and {len(mu2)} values have no distance")
    root1, root2 = ((u * np.sqrt(v)) @ u.T for v, u in ((values1, vectors1), (values2, vectors2)))
    cross = np.linalg.svd(root1 @ root2, compute_uv=False).sum()
    difference = np.asarray(mu1, dtype=np.float64) - np.asarray(mu2, dtype=np.float64)
    variances = values1.sum() + values2.sum()
    distance = float(np.sum(difference**2) + variances - 2 * cross)
    if not np.isfinite(distance) or distance < -ROUNDING * variances:
        raise ValueError(f"the Frechet distance came out as {distance}; the statistics are out of range")
    return max(0.0, distance)  # rounding can leave equal sets just below zero


def _covariance_spectrum(
    mean: np.ndarray, covariance: np.ndarray, names: tuple[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (D,), those that rounding left below zero at zero, and eigenvectors of a covariance."""
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    for name, array in zip(names, (mean, covariance), strict=True):
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{name} is {array.dtype}; real numbers are needed")
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{' and '.join(names)} of shapes {mean.shape} and {covariance.shape} do not fit")
    covariance = covariance.astype(np.float64)
    for name, array in zip(names, (mean, covariance), strict=True):
        if bad := array.size - np.count_nonzero(np.isfinite(array)):
            raise ValueError(f"{name} holds {bad} of {array.size} values that are not finite")
    asymmetry, largest = np.abs(covariance - covariance.T).max(), np.abs(covariance).max()
    if asymmetry > ROUNDING * largest:
        raise ValueError(
            f"{names[1]} is not symmetric, {asymmetry:.3g} apart where its largest is {largest:.3g}"
        )
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -ROUNDING * max(values[-1], 0):
        raise ValueError(
            f"{names[1]} is no covariance: its eigenvalues reach from {values[0]:.3g} to {values[-1]:.3g}"
        )
    return values.clip(min=0), vectors
