import pytest
import torch

from cache import ForecastCache, SoftCache, StaticCache, sampling_cache
from denoiser import Denoiser
from router import Schedule
from sampling import generate


def random_schedule(num_steps: int, num_branches: int, seed: int = 0) -> Schedule:
    generator = torch.Generator().manual_seed(seed)
    return Schedule(torch.rand(num_steps, num_branches, generator=generator) > 0.5)


def test_all_compute_equals_no_cache_bit_for_bit(tiny_model, ten_steps, tiny_batch):
    noise, labels = tiny_batch
    everything = Schedule(torch.ones(10, 4, dtype=torch.bool))
    plain = generate(tiny_model, ten_steps, labels, noise, 1.5)
    assert torch.equal(generate(tiny_model, ten_steps, labels, noise, 1.5, schedule=everything), plain)


def test_soft_cache_with_hard_scores_equals_static(tiny_model, ten_steps, tiny_batch):
    noise, labels = tiny_batch
    schedule = random_schedule(10, 4)
    outputs = []
    for cache in (StaticCache(schedule), SoftCache(schedule.compute.float(), 0.1)):
        denoise = Denoiser(tiny_model, ten_steps, labels, 1.5)
        x_t = denoise.start(noise)
        for step in reversed(range(10)):
            x_t = ten_steps.ddim_step(denoise(x_t, step, cache), x_t, step)
        outputs.append(x_t)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("threshold", ["0.1", "0.5", "0.9"])
def test_static_cache_runs_exactly_the_scheduled_branches(reference_model, ten_steps, expected, threshold):
    """Counted by hooks on the modules themselves: a reused branch executes none of its layers."""
    schedule = Schedule(expected[f"cached.computed_thres{threshold}"])
    runs = []
    handles = []
    for i, block in enumerate(reference_model.blocks):
        for branch, module in ((2 * i, block.attn), (2 * i + 1, block.mlp)):
            handles.append(module.register_forward_hook(lambda *_, b=branch: runs.append(b)))
    generate(
        reference_model, ten_steps, expected["sample.labels"], expected["sample.z"], 1.5, schedule=schedule
    )
    for handle in handles:
        handle.remove()
    assert runs == [b for step in reversed(range(10)) for b in range(6) if schedule.compute[step, b]]


def test_soft_cache_blends_and_refreshes_above_the_threshold_only():
    scores = torch.tensor([[0.05, 0.6], [1.0, 1.0]])
    cache = SoftCache(scores, 0.1)
    cache.step = 1
    first = [cache(b, lambda: torch.tensor([2.0])) for b in range(2)]
    assert [x.item() for x in first] == [2.0, 2.0]
    cache.step = 0
    blended = [cache(b, lambda: torch.tensor([10.0])).item() for b in range(2)]
    assert blended == pytest.approx([0.05 * 10 + 0.95 * 2, 0.6 * 10 + 0.4 * 2])
    # Branch 0 kept 2.0 (its score is not above 0.1); branch 1 stores the blend, not the computed output.
    cache.scores = torch.zeros(2, 2)
    assert [cache(b, lambda: torch.tensor([99.0])).item() for b in range(2)] == pytest.approx([2.0, 6.8])


def test_store_is_detached():
    score = torch.tensor([0.5], requires_grad=True)
    cache = SoftCache([score, torch.ones(1)], 0.1)
    cache.step = 1
    cache(0, lambda: torch.tensor([1.0]))
    cache.step = 0
    assert cache(0, lambda: torch.tensor([3.0])).requires_grad
    cache.scores = [torch.zeros(1), torch.ones(1)]
    assert not cache(0, lambda: torch.tensor([3.0])).requires_grad


def test_restored_snapshot_is_independent_of_what_follows():
    cache = SoftCache(torch.ones(2, 1), 0.1)
    cache(0, lambda: torch.tensor([1.0]))
    stored = cache.snapshot()
    cache(0, lambda: torch.tensor([5.0]))
    other = SoftCache(torch.zeros(2, 1), 0.1)
    other.restore(stored)
    assert other(0, lambda: torch.tensor([9.0])).item() == 1.0


def computed_at(steps: set[int], outputs, order: int, num_steps: int = 8) -> list[float]:
    """What a cache returns at every step where `outputs(step)` is computed at these steps alone."""
    table = torch.zeros(num_steps, 1, dtype=torch.bool)
    table[list(steps)] = True
    cache, seen = sampling_cache(Schedule(table), order), {}
    for step in reversed(range(num_steps)):
        cache.step = step
        seen[step] = cache(0, lambda step=step: torch.tensor(float(outputs(step)))).item()
    return [seen[step] for step in range(num_steps)]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [{7, 6}, {7, 5, 4, 1}, {7, 5, 3, 1}])
def test_forecast_of_a_line_is_exact(order, steps):
    """From the second computed output on; before it there is nothing to extrapolate from."""
    seen = computed_at(steps, lambda step: 3 - 2 * step, order)
    second = sorted(steps)[-2]
    assert seen[:second] == pytest.approx([3 - 2 * step for step in range(second)])
    assert all(value == 3 - 14 for value in seen[second + 1 :])


def test_second_order_forecast_by_hand():
    """f = step^2, computed at 7, 5, 4: D1 = (49-25)/-2 -> -12 per step down, then -9, D2 = (-9 + 12) / 1."""
    seen = computed_at({7, 5, 4}, lambda step: step**2, order=2)
    assert seen[3] == pytest.approx(16 - 9 + 3 / 2)
    assert seen[0] == pytest.approx(16 - 9 * 4 + 3 * 16 / 2)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_forecast_with_everything_computed_is_uncached(tiny_model, ten_steps, tiny_batch, order):
    noise, labels = tiny_batch
    everything = Schedule(torch.ones(10, 4, dtype=torch.bool))
    plain = generate(tiny_model, ten_steps, labels, noise, 1.5)
    cached = generate(tiny_model, ten_steps, labels, noise, 1.5, schedule=everything, forecast_order=order)
    assert torch.equal(cached, plain)


def test_forecast_of_order_zero_is_plain_reuse(tiny_model, ten_steps, tiny_batch):
    noise, labels = tiny_batch
    schedule, outputs = random_schedule(10, 4), []
    for cache in (StaticCache(schedule), ForecastCache(schedule, 0)):
        denoise = Denoiser(tiny_model, ten_steps, labels, 1.5)
        x_t = denoise.start(noise)
        for step in reversed(range(10)):
            x_t = ten_steps.ddim_step(denoise(x_t, step, cache), x_t, step)
        outputs.append(x_t)
    assert torch.equal(*outputs)
    with pytest.raises(ValueError, match="order 3 is not one of 0 .. 2"):
        ForecastCache(schedule, 3)


def test_straight_through_blends_hard_and_passes_the_gradient_on():
    scores = torch.tensor([[0.05, 0.6], [1.0, 1.0]], requires_grad=True)
    cache = SoftCache(scores, 0.1, straight_through=True)
    for branch in (0, 1):
        cache(branch, lambda: torch.tensor(2.0))
    cache.step = 0
    outputs = [cache(branch, lambda: torch.tensor(5.0)) for branch in (0, 1)]
    assert [output.item() for output in outputs] == [2.0, 5.0]
    sum(outputs).backward()
    assert scores.grad[0].tolist() == [3.0, 3.0]  # d(w * 5 + (1 - w) * 2) / dw
