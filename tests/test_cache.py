import copy

import pytest
import torch

from backbones.denoiser import Denoiser
from cache import FittingCache, GatedCache, SoftCache, StaticCache, combined
from router import Schedule
from sampling.loop import generate
from schedules.forecasts import taylor


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
        x_t = denoise.start(noise).x
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
    cache, seen = StaticCache(taylor(Schedule(table), order)), {}
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
    schedule = taylor(everything, order)
    cached = generate(tiny_model, ten_steps, labels, noise, 1.5, schedule=schedule)
    assert torch.equal(cached, plain)


def test_forecast_of_order_zero_is_plain_reuse():
    schedule = random_schedule(10, 4)
    assert taylor(schedule, 0) is schedule
    with pytest.raises(ValueError, match="order 3 is not one of 0 .. 2"):
        taylor(schedule, 3)


def trajectory(model, diffusion, batch, cache) -> torch.Tensor:
    noise, labels = batch
    denoise = Denoiser(model, diffusion, labels, 1.5)
    x_t = denoise.start(noise).x
    for step in reversed(range(diffusion.num_timesteps)):
        x_t = diffusion.ddim_step(denoise(x_t, step, cache), x_t, step)
    return x_t


def random_weights(num_terms: int = 3, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    plain = torch.tensor([1.0, 0.0, 0.0])[:num_terms]
    return plain + 0.3 * torch.randn(10, 4, num_terms, generator=generator)


def test_weights_that_copy_are_plain_reuse_bit_for_bit(tiny_model, ten_steps, tiny_batch):
    plain = random_schedule(10, 4)
    copied = Schedule(plain.compute, weights=torch.tensor([1.0, 0, 0]).expand(10, 4, 3))
    outputs = [trajectory(tiny_model, ten_steps, tiny_batch, StaticCache(one)) for one in (plain, copied)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("num_terms", [1, 3])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_at_zero_and_one_are_static_bit_for_bit(
    tiny_model, ten_steps, tiny_batch, num_terms, per_sample, dtype
):
    model = copy.deepcopy(tiny_model).to(dtype)
    schedule = Schedule(random_schedule(10, 4).compute, weights=random_weights(num_terms))
    gates = schedule.compute.float()
    gates = gates[..., None].repeat(1, 1, 3) if per_sample else gates
    calls, plain_calls = [], []

    def counted(cache, calls):
        def call(branch, compute):
            return cache(branch, lambda: calls.append(branch) or compute())

        class Counted:
            step = property(None, lambda _, step: setattr(cache, "step", step))
            __call__ = staticmethod(call)

        return Counted()

    gated = counted(GatedCache(gates, schedule.weights), calls)
    static = counted(StaticCache(schedule), plain_calls)
    outputs = [trajectory(model, ten_steps, tiny_batch, cache) for cache in (gated, static)]
    assert torch.equal(*outputs)
    assert calls == plain_calls
    # Blending at 0 and 1 computes what it does not need, and changes nothing either.
    soft = GatedCache(gates, schedule.weights, soft=torch.ones(10, 4, dtype=torch.bool))
    assert torch.equal(trajectory(model, ten_steps, tiny_batch, soft), outputs[0])


def test_half_a_gate_blends_the_output_and_the_store():
    gates = torch.tensor([[0.0], [0.25], [1.0], [1.0]])
    cache = GatedCache(gates, torch.tensor([2.0, -1.0]).expand(4, 1, 2))
    seen = {}
    for step, output in ((3, 1.0), (2, 4.0), (1, 8.0), (0, 100.0)):
        cache.step = step
        seen[step] = cache(0, lambda output=output: torch.full((1, 1, 1), output)).item()
    assert seen[2] == 4
    assert seen[1] == pytest.approx(0.25 * 8 + 0.75 * (2 * 4 - 1))
    # The store is a quarter of (8, 4) and three quarters of (4, 1).
    assert seen[0] == pytest.approx(2 * 5 - 1.75)


def test_fitted_weights_are_least_squares(tiny_model, ten_steps, tiny_batch):
    """In one cell, against torch's own solver, on the outputs that the trajectory meets there."""
    compute = torch.zeros(10, 4, dtype=torch.bool)
    compute[[9, 7, 6]] = True
    cache, met = FittingCache(compute, 3), []

    class Spy:
        step = property(None, lambda _, step: setattr(cache, "step", step))

        def __call__(self, branch, compute):
            stored, met_here = cache.snapshot()[branch], []
            output = cache(branch, lambda: met_here.append(compute()) or met_here[-1])
            if (cache.step, branch) == (5, 2):
                met.extend([stored, met_here[0], output])
            return output

    trajectory(tiny_model, ten_steps, tiny_batch, Spy())
    stored, target, returned = met
    assert len(stored) == 3
    matrix = torch.stack([one.double().flatten() for one in stored], dim=1)
    best = torch.linalg.lstsq(matrix, target.double().flatten()).solution
    torch.testing.assert_close(cache.weights[5, 2], best, rtol=1e-2, atol=1e-3)  # a ridge stands between
    torch.testing.assert_close(returned, combined(stored, cache.weights[5, 2].tolist()))
    left = (target.double().flatten() - matrix @ best).square().mean()
    assert cache.residual[5, 2].item() == pytest.approx(left.item(), rel=1e-2)


def test_fit_finds_the_law_of_the_outputs():
    """Outputs on a line are extrapolated exactly, whatever the steps between the computed ones."""
    compute = torch.zeros(8, 1, dtype=torch.bool)
    compute[[7, 5]] = True
    cache = FittingCache(compute, 2)
    direction = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    start = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    for step in reversed(range(8)):
        cache.step = step
        output = cache(0, lambda step=step: start + step * direction)
        if step < 5:
            torch.testing.assert_close(output, start + step * direction, rtol=1e-3, atol=1e-3)
    last_step = 0
    assert cache.weights[last_step, 0].tolist() == pytest.approx([1 + 5 / 2, -5 / 2], rel=1e-3)


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


@pytest.mark.parametrize("straight_through", [False, True])
def test_gradients_of_the_soft_blend_are_those_of_lerp(straight_through):
    """Of the score, and of the computed output, with the store as a constant."""
    generator = torch.Generator().manual_seed(5)
    outputs = [torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    grad = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    score = torch.tensor([[0.7]], dtype=torch.float64).repeat(2, 1).requires_grad_()
    computed = outputs[1].clone().requires_grad_()
    cache = SoftCache(score, 0.1, straight_through)
    cache(0, lambda: outputs[0])
    cache.step = 0
    blended = cache(0, lambda: computed)
    weight = 1.0 if straight_through else 0.7
    torch.testing.assert_close(blended, outputs[0] + weight * (outputs[1] - outputs[0]))
    of_computed, of_score = torch.autograd.grad(blended, (computed, score), grad)
    torch.testing.assert_close(of_computed, weight * grad)
    torch.testing.assert_close(of_score[0, 0], (grad * (outputs[1] - outputs[0])).sum())
