import numpy as np
import pytest
import torch

from metrics.frechet import RunningStatistics, feature_statistics, frechet_distance
from metrics.inception_score import inception_score
from metrics.paired import mse, psnr, ssim
from metrics.precision_recall import precision_recall


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


def test_running_statistics_are_numpys_whatever_the_batches():
    features = 1e4 + np.random.default_rng(3).normal(size=(257, 6)) @ np.random.default_rng(4).normal(
        size=(6, 6)
    )
    running = RunningStatistics()
    for batch in np.array_split(features.astype(np.float32), [1, 40, 200]):
        running.update(batch)
    mean, covariance = running.finish()
    single = features.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(mean, single.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(single, rowvar=False), rtol=1e-8)
    with pytest.raises(ValueError, match="1 samples have no covariance"):
        feature_statistics(features[:1])


def test_inception_score_is_its_closed_form():
    """Certain and evenly spread over K classes: K. The same for every image: 1."""
    certain = np.eye(8)[np.arange(400) % 8]
    assert inception_score(certain)[0] == pytest.approx(8)
    same = np.tile([0.2, 0.3, 0.5], (100, 1))
    assert inception_score(same) == (pytest.approx(1), pytest.approx(0))
    assert inception_score(certain[:1])[0] == pytest.approx(1)


@pytest.mark.slow
def test_inception_score_takes_parts_of_5000_as_adm_does():
    """Below 50,000 samples that is another number than ten parts: each part's marginal is its own."""
    p = np.random.default_rng(0).dirichlet(np.full(1000, 0.001), size=12_000)

    def score(part: np.ndarray) -> float:
        marginal = part.mean(0)
        logs = np.log(np.where(part > 0, part, 1)) - np.log(np.where(marginal > 0, marginal, 1))
        return np.exp((part * logs).sum(1).mean())

    parts = [score(p[:5000]), score(p[5000:10_000]), score(p[10_000:])]
    mean, std = inception_score(p)
    assert mean == pytest.approx(np.mean(parts), rel=1e-9)
    assert std == pytest.approx(np.std(parts), rel=1e-6)
    assert inception_score(p[:10_000])[0] > 1.2 * np.mean([score(part) for part in np.split(p[:10_000], 10)])


BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("position", range(4))
def test_no_frechet_distance_from_statistics_that_are_not_finite(bad, position):
    statistics = [np.zeros(3), np.eye(3), np.ones(3), np.eye(3)]
    statistics[position] = statistics[position].copy()
    statistics[position].flat[1] = bad
    name = ("mu1", "sigma1", "mu2", "sigma2")[position]
    with pytest.raises(ValueError, match=f"{name} holds 1 of . values that are not finite"):
        frechet_distance(*statistics)


def test_no_frechet_distance_from_what_is_no_covariance():
    mean, good = np.zeros(3), np.eye(3)
    for bad, words in (
        (np.diag([1.0, 1.0, -0.1]), "eigenvalues reach from -0.1 to 1"),
        (-good, "eigenvalues reach from -1 to -1"),
        (np.array([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 1]]), "not symmetric"),
        (np.ones((3, 2)), "do not fit"),
        (np.ones(3), "do not fit"),
        (good * 1j, "real numbers are needed"),
        (good.astype(str), "real numbers are needed"),
        (good > 0, "real numbers are needed"),
    ):
        for statistics in ((mean, bad, mean, good), (mean, good, mean, bad)):
            with pytest.raises(ValueError, match=words):
                frechet_distance(*statistics)
    with pytest.raises(ValueError, match="means of 3 and 2 values"):
        frechet_distance(mean, good, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="came out as inf"), np.errstate(over="ignore"):
        frechet_distance(mean + 1e200, good, mean, good)


def test_covariances_that_single_precision_rounded_are_taken():
    """Of fewer samples than dimensions, kept in float32: eigenvalues a little below zero are rounding."""
    features = np.random.default_rng(6).normal(size=(40, 100)) * np.linspace(1, 30, 100) + 5
    mean, covariance = feature_statistics(features)
    rounded = mean.astype(np.float32), covariance.astype(np.float32)
    assert np.linalg.eigvalsh(rounded[1].astype(float))[0] < 0
    assert frechet_distance(*rounded, mean, covariance) < 1e-4 * np.trace(covariance)


@pytest.mark.parametrize("bad", BAD)
def test_no_metric_returns_a_number_from_what_is_not_finite(bad):
    features = np.random.default_rng(7).normal(size=(20, 4)).astype(np.float32)
    broken = features.copy()
    broken[13, 2] = bad
    running = RunningStatistics()
    running.update(features[:7])
    with pytest.raises(ValueError, match="features hold NaN or infinity, the first in number 13"):
        running.update(broken[7:])
    probabilities = np.full((20, 4), 0.25)
    probabilities[13, 2] = bad
    with pytest.raises(ValueError, match="probabilities hold NaN or infinity, the first in number 13"):
        inception_score(probabilities)
    for pair in ((broken, features), (features, broken)):
        one, other = map(torch.from_numpy, pair)
        with pytest.raises(ValueError, match="the first in number 13"):
            precision_recall(one, other)
        with pytest.raises(ValueError, match="the first in number 13"):
            mse(one, other)
    with pytest.raises(ValueError, match="number 13"):
        mse(torch.from_numpy(broken), torch.from_numpy(broken))
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="images are torch.float32"):
            metric(torch.full((1, 8, 8, 1), bad), torch.zeros(1, 8, 8, 1))


def test_no_metric_returns_a_number_from_finite_values_that_cannot_be():
    with pytest.raises(ValueError, match="distances between features"):  # infinite, and so within every reach
        precision_recall(torch.randn(8, 2) * 1e30, torch.randn(8, 2) * 1e30)
    with pytest.raises(ValueError, match="mean squared error came out as inf"):
        mse(torch.full((3,), 1e200, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="no pairs"):  # would broadcast
        mse(torch.zeros(3, 1), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="no pairs"):
        mse(torch.zeros(0, 4), torch.zeros(0, 4))
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="no pairs"):
            metric(images, images[..., :1])
    for wrong in (
        np.full((5, 4), 0.5),
        np.array([[1.5, -0.5]]),
        np.random.default_rng(8).normal(size=(5, 4)),
    ):
        with pytest.raises(ValueError, match="add up to 1"):
            inception_score(wrong)
    for wrong in (np.ones(4), np.ones((0, 4)), np.ones((2, 1), dtype=int)):
        with pytest.raises(ValueError, match="are needed"):
            inception_score(wrong)


def test_precision_and_recall_of_sets_that_are_the_same_apart_or_inside():
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand(400, 2, generator=generator)
    assert precision_recall(wide, wide) == (1, 1)
    assert precision_recall(wide + 10, wide) == (0, 0)
    corner = wide / 4  # all of it lies in the square, a sixteenth of the square in it
    precision, recall = precision_recall(corner, wide, block=70)
    assert precision > 0.95
    assert 0.02 < recall < 0.15
    with pytest.raises(ValueError, match="3 points have no 3-th neighbour"):
        precision_recall(wide[:3], wide)


def test_the_same_features_score_as_in_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    generator = torch.Generator().manual_seed(5)
    one, other = (
        torch.randn(503, 32, generator=generator),
        torch.randn(402, 32, generator=generator) * 1.2 + 0.2,
    )
    theirs = [fid_features_to_statistics(features.double()) for features in (one, other)]
    fid = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(*feature_statistics(one.numpy()), *feature_statistics(other.numpy()))
    assert ours == pytest.approx(fid, rel=1e-6)

    scores = isc_features_to_metric(one[:500], splits=10, shuffle=False)
    mean, std = inception_score(one[:500].softmax(dim=1).numpy(), split_size=50)
    assert mean == pytest.approx(scores["inception_score_mean"], rel=1e-6)
    assert std == pytest.approx(scores["inception_score_std"], rel=1e-4)

    prc = prc_features_to_metric(
        one, other, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=True, verbose=False
    )
    precision, recall = precision_recall(one, other, block=77)
    assert precision == pytest.approx(prc["precision"], abs=1e-6)
    assert recall == pytest.approx(prc["recall"], abs=1e-6)
    assert 0 < recall < 1
    assert 0 < precision < 1


def test_ssim_is_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 16, 20, 3), generator=generator).to(torch.uint8)
    assert ssim(images, images).tolist() == pytest.approx([1, 1, 1])
    black, grey = (
        torch.zeros(2, 12, 12, 1, dtype=torch.uint8),
        torch.full((2, 12, 12, 1), 100, dtype=torch.uint8),
    )
    c1 = (0.01 * 255) ** 2  # without variance only the luminance term is left
    assert ssim(black, grey).tolist() == pytest.approx([c1 / (100**2 + c1)] * 2)
    digits = torch.randint(256, (2, 8, 8, 1), generator=generator).to(torch.uint8)
    assert (ssim(digits, 255 - digits) < 0).all()  # smaller than the window, and opposite


def test_ssim_by_hand_at_one_position():
    """A window as large as the image has one position: weighted means, variances and the formula."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2, 11, 11)).astype(np.uint8)
    line = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    weights = np.outer(line, line) / line.sum() ** 2
    a, b = x.astype(float), y.astype(float)
    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
    var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
    covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = 6.5025, 58.5225
    by_hand = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    by_hand /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    value = ssim(torch.from_numpy(x)[None, ..., None], torch.from_numpy(y)[None, ..., None])
    assert value.item() == pytest.approx(by_hand)
