import numpy as np
import pytest
import torch

from metrics.frechet import feature_statistics, frechet_distance
from metrics.paired import mse, psnr


def test_frechet_distance_of_commuting_gaussians_is_its_closed_form():
    """With diagonal covariances: squared distance of the means and of the standard deviations."""
    rng = np.random.default_rng(0)
    mu1, mu2, std1, std2 = rng.uniform(0.1, 3, (4, 20))
    rotation = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    sigma1, sigma2 = ((rotation * std**2) @ rotation.T for std in (std1, std2))
    closed_form = np.sum((mu1 - mu2) ** 2) + np.sum((std1 - std2) ** 2)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(closed_form, rel=1e-9)


def test_frechet_distance_agrees_with_the_matrix_root():
    """The usual formula, with scipy's square root of the product, on covariances that do not commute."""
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(300, 16)), rng.normal(size=(200, 16)) @ rng.normal(size=(16, 16))
    (mu1, sigma1), (mu2, sigma2) = feature_statistics(one), feature_statistics(other)
    usual = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * sqrtm(sigma1 @ sigma2).real)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(usual, rel=1e-8)


def test_frechet_distance_to_itself_is_zero_with_a_singular_covariance():
    features = np.random.default_rng(2).normal(size=(50, 8)) @ np.diag([1, 2, 3, 0, 0, 1, 1, 0])
    statistics = feature_statistics(features)
    assert frechet_distance(*statistics, *statistics) == pytest.approx(0, abs=1e-8)


def test_paired_metrics_are_their_closed_forms():
    assert mse(torch.full((2, 3), 1.5), torch.ones(2, 3)) == pytest.approx(0.25)
    black, grey = torch.zeros(4, 2, 2, 1, dtype=torch.uint8), torch.full((4, 2, 2, 1), 51, dtype=torch.uint8)
    assert psnr(grey, black) == pytest.approx(20 * np.log10(255 / 51))
    assert psnr(grey, grey) == np.inf
