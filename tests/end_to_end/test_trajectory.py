"""The error of the final image: its gradients, windows and moments, and what toggles of cells do to it."""

import copy
import dataclasses

import pytest
import torch

from cache import GatedCache
from diffusion import create_diffusion
from end_to_end.trajectory import ReferenceTrajectory, toggle_effects
from router import Schedule
from sampling.loop import generate


@pytest.fixture(scope="module")
def reference(tiny_model):
    """Four steps in float64, guided."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(3, 4, 4, 4, generator=generator, dtype=torch.float64)
    return ReferenceTrajectory.draw(
        copy.deepcopy(tiny_model).double(), create_diffusion("4"), noise, torch.tensor([0, 3, 1]), 1.5
    )


def drawn(*size: int, seed: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS = torch.tensor([1.0, 0, 0], dtype=torch.float64) + 0.4 * (drawn(4, 4, 3, seed=6) - 0.5)


def test_uncached_states_are_those_of_sampling(reference):
    x_0 = generate(reference.model, reference.diffusion, reference.labels, reference.noise, 1.5)
    torch.testing.assert_close(reference.states[0], x_0, rtol=0, atol=0)
    everything = GatedCache(torch.ones(4, 4), WEIGHTS)
    assert reference.errors(everything)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("store_gradient", [True, False])
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_equal_finite_differences(reference, store_gradient, per_sample):
    """Of log MSE of x_0, in gates and weights. Without its gradient the store is held where it is."""
    gates = (drawn(4, 4, 3, seed=4) if per_sample else drawn(4, 4, seed=4)).requires_grad_()
    if not store_gradient:  # then gates move the store, but their gradient does not say so
        gates = gates.detach().round().requires_grad_()
    weights = WEIGHTS.clone().requires_grad_()

    def loss(gates, weights):
        cache = GatedCache(gates, weights, torch.ones(4, 4, dtype=torch.bool), store_gradient)
        return reference.errors(cache)[0].mean().log()

    of_gates, of_weights = torch.autograd.grad(loss(gates, weights), (gates, weights))
    picked = torch.Generator().manual_seed(0)
    checked = ((weights, of_weights),) if not store_gradient else ((gates, of_gates), (weights, of_weights))
    for tensor, gradient in checked:
        for _ in range(12):
            index = tuple(int(torch.randint(size, (), generator=picked)) for size in tensor.shape)
            ends = []
            for sign in (1, -1):
                moved = tensor.detach().clone()
                moved[index] += sign * 1e-5
                with torch.no_grad():
                    ends.append(loss(*((moved, weights) if tensor is gates else (gates, moved))))
            difference = (ends[0] - ends[1]) / 2e-5
            assert gradient[index].item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-8), index
    assert (of_gates[-1] == 0).all()  # the first step has nothing to reuse


@pytest.mark.parametrize("window", [None, 2])
def test_recomputed_gradients_equal_plain_ones(reference, window):
    gradients = []
    for recompute in (False, True):
        gates, weights = drawn(4, 4, seed=4).requires_grad_(), WEIGHTS.clone().requires_grad_()
        errors = torch.stack(reference.errors(GatedCache(gates, weights), recompute, window))
        assert len(errors) == (2 if window else 1)
        gradients.append(torch.autograd.grad(errors.mean(1).log().sum(), (gates, weights)))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-14)
        assert plain.abs().max() > 1e-4


def test_recomputing_keeps_less(reference):
    """Counted in what autograd saves: within a step or over all of them."""
    kept = {}
    for recompute in (False, True):
        weights, saved = WEIGHTS.clone().requires_grad_(), {}

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            reference.errors(GatedCache(drawn(4, 4, seed=4), weights), recompute)[0].mean().backward()
        kept[recompute] = sum(saved.values())
    assert kept[True] < 0.5 * kept[False]


def test_windows_cut_the_gradient(reference):
    """What the first window's cells do to x_0 is not seen through a later window's start."""
    weights = WEIGHTS.clone().requires_grad_()
    gates = torch.tensor([[0.0] * 4, [0.0] * 4, [0.0] * 4, [1.0] * 4], dtype=torch.float64)
    at_x_0, at_the_cut = reference.errors(GatedCache(gates, weights), window=2)
    (of_x_0,) = torch.autograd.grad(at_x_0.sum(), weights, retain_graph=True)
    (of_cut,) = torch.autograd.grad(at_the_cut.sum(), weights)
    assert (of_x_0[2:] == 0).all()
    assert (of_x_0[:2, :, 0] != 0).all()
    assert (of_cut[:2] == 0).all()
    assert (of_cut[2, :, 0] != 0).all()


@pytest.fixture(scope="module")
def grey(reference):
    """Pictures on both sides of black and white, and changes of them that carry some across."""
    states = [3 * drawn(4, 4, 4, 4, seed=9) - 1.5]
    noise, labels = drawn(4, 4, 4, 4, seed=10), torch.tensor([0, 3, 1, 2])
    importance = torch.tensor([0.5, 1.5, 1.0, 0.8], dtype=torch.float64)
    deviation = 0.4 * (drawn(4, 64, seed=8) - 0.3)
    own = dataclasses.replace(reference, noise=noise, labels=labels, states=states, importance=importance)
    return own, deviation.requires_grad_()


@pytest.mark.parametrize("in_pixels", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_moments_are_the_changes_of_mean_and_variance(grey, in_pixels, weighed):
    """Written out, with their gradient; and none where nothing changes."""
    reference, deviation = grey
    reference = reference if weighed else dataclasses.replace(reference, importance=None)
    weights = reference.importance[:, None] if weighed else torch.ones(4, 1, dtype=torch.float64)

    def expected(deviation):
        before = reference.states[0].flatten(1)
        after = before + deviation / weights.sqrt()
        if in_pixels:
            before, after = before.clamp(-1, 1), after.clamp(-1, 1)
        mean = (weights * before).mean(0)
        of_mean = ((weights * after).mean(0) - mean).square().mean()
        variances = [(weights * (x - mean).square()).mean() for x in (before, after)]
        return 7 * (of_mean + (variances[1] - variances[0]).square() / variances[0])

    found = reference.moment_error(deviation, in_pixels, 7, lambda mean: mean)
    torch.testing.assert_close(found, expected(deviation))
    gradients = [torch.autograd.grad(value, deviation)[0] for value in (found, expected(deviation))]
    torch.testing.assert_close(*gradients)
    cut = gradients[0] == 0
    assert cut.any() == in_pixels
    assert not cut.all()
    assert found > 0
    assert reference.moment_error(0 * deviation, in_pixels, 7, lambda mean: mean) == 0


def test_moments_of_two_ranks_are_those_of_all_samples(grey):
    """Every mean that is asked for is that of what the ranks hand in, and so are result and gradient."""
    reference, deviation = grey

    def moments(part: slice, reduce) -> torch.Tensor:
        own = dataclasses.replace(
            reference,
            noise=reference.noise[part],
            labels=reference.labels[part],
            importance=reference.importance[part],
            states=[reference.states[0][part]],
        )
        return own.moment_error(deviation[part], True, 4, reduce)

    of_all, handed_in = [], ([], [])

    def note(mean):
        of_all.append(mean)
        return mean

    one, both = moments(slice(0, 4), note), 0
    for rank, part in enumerate((slice(0, 2), slice(2, 4))):

        def answer(mean, rank=rank):
            handed_in[rank].append(mean)
            return of_all[len(handed_in[rank]) - 1]

        both = both + moments(part, answer) / 2
    for first, second, mean in zip(*handed_in, of_all, strict=True):
        torch.testing.assert_close((first + second) / 2, mean)
    torch.testing.assert_close(both, one)
    of_both, of_one = (torch.autograd.grad(value, deviation)[0] for value in (both, one))
    torch.testing.assert_close(of_both, of_one)


def error_of(reference, compute, weights) -> float:
    """The mean squared error of x_0, samples weighed by importance, of a schedule as it is sampled."""
    schedule = Schedule(compute, weights=weights)
    x_0 = generate(
        reference.model, reference.diffusion, reference.labels, reference.noise, 1.5, schedule=schedule
    )  # fmt: skip
    errors = (x_0 - reference.states[0]).square().flatten(1).mean(1)
    return (errors if reference.importance is None else reference.importance * errors).mean().item()


@pytest.mark.parametrize("weighed", [False, True])
def test_toggle_effects_tell_what_toggles_do(tiny_model, weighed):
    """On a model whose branches matter little, so that second order is all there is."""
    model = copy.deepcopy(tiny_model).double()
    for block in model.blocks:
        block.adaLN_modulation[1].weight.mul_(0.05)
        block.adaLN_modulation[1].bias.mul_(0.05)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(64, 4, 4, 4, generator=generator, dtype=torch.float64)
    reference = ReferenceTrajectory.draw(model, create_diffusion("4"), noise, torch.arange(64) % 5, 1.5)
    if weighed:
        importance = 4 * torch.rand(64, generator=generator, dtype=torch.float64) ** 4
        reference = dataclasses.replace(reference, importance=importance)
    compute = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    weights = torch.ones(4, 4, 1, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(k) for k in range(64)]
    effects = toggle_effects(reference, compute, weights, True, generators, probes=8)
    assert (effects[-1] == 0).all()
    before, true = error_of(reference, compute, weights), torch.zeros(4, 4, dtype=torch.float64)
    for step in range(3):
        for branch in range(4):
            toggled = compute.clone()
            toggled[step, branch] ^= True
            true[step, branch] = error_of(reference, toggled, weights) - before
    large = true.abs() > 0.1 * true.abs().max()
    assert large.sum() >= 4
    assert (effects.sign() == true.sign())[large].all()
    torch.testing.assert_close(effects[large], true[large], rtol=0.35, atol=0)
    some = torch.rand(4, 4, generator=generator) < 0.5
    asked = toggle_effects(reference, compute, weights, True, generators, asked=some)
    assert (asked[~some] == 0).all()
