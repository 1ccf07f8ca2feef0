"""Batches drawn by importance: how often a sample is in one, and that their mean is the pool's."""

import pytest
import torch

from end_to_end.importance import inclusion, systematic_sample


def test_inclusion_is_in_proportion_by_its_share():
    sizes = torch.tensor([1.0, 3.0, 0.0, 4.0])
    half = torch.tensor([0.75, 1.25, 0.5, 1.5], dtype=torch.float64) / 4
    torch.testing.assert_close(inclusion(sizes, 1, by_size=0.5), half)
    quarter = torch.tensor([0.875, 1.125, 0.75, 1.25], dtype=torch.float64) / 4
    torch.testing.assert_close(inclusion(sizes, 1), quarter)
    torch.testing.assert_close(inclusion(torch.zeros(5), 2), torch.full((5,), 0.4, dtype=torch.float64))
    for seed in range(200):  # exactly, whatever the rounding
        sizes = torch.rand(6, generator=torch.Generator().manual_seed(seed))
        assert (inclusion(sizes, 6) == 1).all()


def test_none_is_drawn_more_than_once():
    """Whoever would be is certain, and the others share what is left."""
    sizes = torch.tensor([1000.0, 100.0, *[1.0] * 62])
    probabilities = inclusion(sizes, 16, by_size=0.5)
    assert probabilities[:2].tolist() == [1, 1]
    assert (probabilities[2:] < 1).all()
    assert probabilities.sum().item() == pytest.approx(16)
    indices, weights = systematic_sample(probabilities, torch.Generator().manual_seed(0))
    assert len(set(indices.tolist())) == len(weights) == 16
    assert {0, 1} <= set(indices.tolist())


@pytest.mark.parametrize(("by_size", "times"), [(0.5, 3), (0.25, 2)])
def test_the_mean_of_batches_is_the_mean_of_the_pool(by_size, times):
    """And varies less than that of uniform batches, where the sizes tell which values are large."""
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(256, generator=generator) ** 20
    sizes = values * (0.5 + torch.rand(256, generator=generator))
    probabilities, estimates = inclusion(sizes, 16, by_size), []
    for _ in range(2000):
        indices, weights = systematic_sample(probabilities, generator)
        estimates.append((weights * values[indices]).mean())
    estimates = torch.stack(estimates)
    uniform = values[torch.randint(256, (2000, 16), generator=generator)].mean(1)
    assert estimates.mean().item() == pytest.approx(values.mean().item(), rel=0.02)
    assert estimates.std() < uniform.std() / times
