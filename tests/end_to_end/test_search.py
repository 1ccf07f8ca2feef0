"""The search for a schedule under a budget: what it costs, how it starts, what it opens and closes."""

import math

import pytest
import torch
from conftest import relative_error

from backbones.loading import build_model
from end_to_end.search import (
    CANDIDATES,
    FULL_ROW_CANDIDATES,
    Budget,
    best_of,
    exchanged,
    fit,
    interpolated,
    learning_rate,
    spending,
)
from end_to_end.trajectory import ReferenceTrajectory
from router import Schedule, weights_read
from sampling.loop import generate
from schedules.any_speed import moving_scale
from schedules.baselines import fora_schedule, random_schedule
from training.target import Target


@pytest.fixture(scope="module")
def digits():
    return build_model("DiT-digits/2")


def budget_of(digits, value=2.0, num_steps=10, num_terms=3, kind="speedup") -> Budget:
    return Budget.of(Target(kind, value, digits, num_steps), num_terms)


@pytest.mark.parametrize("num_terms", [0, 1, 3])
def test_spent_is_what_the_schedule_costs(digits, num_terms):
    """By `Schedule.macs`, the reading of outputs that are there included."""
    budget, everything = budget_of(digits, num_terms=num_terms), torch.ones(10, 24, dtype=torch.bool)
    for seed in range(3):
        compute = random_schedule(10, 24, 0.6, seed).compute
        weights = torch.full((10, 24, num_terms), 0.4) if num_terms else None
        macs = Schedule(compute, weights=weights).macs(digits)
        others = Schedule(everything).macs(digits) - everything.sum(0) @ budget.costs.long()
        assert budget.spent(compute) == pytest.approx(macs - others.item())


def test_unused_weights_cost_nothing(digits):
    compute = fora_schedule(10, 24, 2).compute
    plain = Schedule(compute)
    for weights in ([1.0, 0.0, 0.0], [1.0]):
        assert Schedule(compute, weights=torch.tensor(weights).expand(10, 24, -1)).macs(digits) == plain.macs(
            digits
        )
    one = Schedule(compute, weights=torch.tensor([0.9, 0.0]).expand(10, 24, 2))
    assert one.macs(digits) - plain.macs(digits) == 5 * 24 * digits.branch_size
    two = Schedule(compute, weights=torch.tensor([2.0, -1.0]).expand(10, 24, 2))
    # Right after the first step there is one output only.
    assert two.macs(digits) - one.macs(digits) == 4 * 24 * digits.branch_size


def test_too_little_is_refused(digits):
    with pytest.raises(ValueError, match="leaves less than the first step"):
        budget_of(digits, 7.7, num_terms=3)


@pytest.mark.parametrize("share", [0.4, 0.8, 1.0])
def test_skeletons_are_full_rows_of_one_number(digits, share):
    budget = budget_of(digits)
    tables = budget.skeletons(10, share)
    assert len(tables) > (share > 0.5)
    for table in tables:
        assert (table.all(1) == table.any(1)).all()
        assert table[-1].all()
        assert budget.spent(table) <= share * budget.allowed + 24 * 10 * 3 * digits.branch_size
    assert len({int(table.all(1).sum()) for table in tables}) == 1
    fora = fora_schedule(10, 24, 2).compute
    assert any(torch.equal(table, fora) for table in budget_of(digits, 1.9).skeletons(10, 1.0))


@pytest.mark.parametrize("speedup", [1.25, 1.52])
def test_candidates_of_a_pool_begin_with_two_steps_where_more_than_half_can_be_computed(digits, speedup):
    budget = budget_of(digits, speedup, 20)
    assert budget.candidates_for_pool(20) == CANDIDATES
    assert budget.leading_steps(20) == 2
    for candidate in CANDIDATES:
        tables = budget.skeletons(20, *candidate, 2)
        assert len(tables) > 1
        assert all(table[-2:].all() for table in tables)


@pytest.mark.parametrize(("speedup", "in_a_row"), [(1.96, 2), (2.77, 1), (3.1, 1)])
def test_candidates_of_a_pool_leave_no_row_where_fewer_can(digits, speedup, in_a_row):
    """And take two in a row where there is room."""
    budget = budget_of(digits, speedup, 20)
    assert budget.candidates_for_pool(20) == FULL_ROW_CANDIDATES
    tables = [budget.skeletons(20, *candidate, budget.leading_steps(20)) for candidate in FULL_ROW_CANDIDATES]
    for (table,) in tables:
        assert budget.spent(table) + budget.costs.sum() > budget.allowed
        assert table.all(1)[-in_a_row:].all()
        assert in_a_row == 2 or not table[-2].any()
    assert not torch.equal(tables[0][0], tables[1][0])


def test_a_skeleton_can_begin_with_steps_in_a_row(digits):
    budget = budget_of(digits, 1.96, 20)
    (table,) = budget.skeletons(20, 1.0, (0.9,), 2)
    computed = sorted(19 - k for k in table.all(1).nonzero().flatten().tolist())
    assert computed == [0, 1, 3, 6, 8, 11, 13, 15, 17]
    (plain,) = budget.skeletons(20, 1.0, (0.9,), 1)
    assert plain.sum() == table.sum()
    (one_row,) = budget_of(digits, 7.0).skeletons(10, 1.0, (0.9,), 2)
    assert one_row.all(1).nonzero().flatten().tolist() == [9]


def test_growing_opens_what_helps_most_for_its_cost(digits):
    budget, compute = budget_of(digits, kind="cur", value=0.5), torch.zeros(10, 24, dtype=torch.bool)
    compute[-1] = True
    effects = torch.zeros(10, 24)
    useful = [(3, 5), (7, 0), (2, 2)]
    for rank, cell in enumerate(useful):
        effects[cell] = rank - 10.0
    table = spending(compute, effects, budget, budget.spent(compute) + 2)
    assert (table & ~compute).nonzero().tolist() == [[3, 5], [7, 0]]
    full = spending(compute, effects, budget, budget.allowed)
    assert full.sum() == 120
    # The other way: what was opened last is what costs least to close.
    shrunk = spending(full, torch.where(full, -effects, 0.0), budget, budget.spent(compute) + 3)
    assert [tuple(cell) for cell in (shrunk & ~compute).nonzero().tolist()] == sorted(useful)


@pytest.mark.parametrize("speedup", [1.25, 1.5, 2.0, 2.5, 3.0])
@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_growing_meets_the_budget_within_a_percent(digits, speedup, num_steps):
    budget = budget_of(digits, speedup, num_steps)
    effects = torch.randn(num_steps, 24, generator=torch.Generator().manual_seed(0))
    weights = torch.full((num_steps, 24, 3), 0.3)
    for share in (0.6, 1.0):
        table = spending(budget.skeletons(num_steps, share)[0], effects, budget, budget.allowed)
        reached = Schedule(table, weights=weights).speedup_macs(digits)
        assert speedup <= reached < 1.01 * speedup
        table = exchanged(table, effects, budget, 0.1)
        assert speedup <= Schedule(table, weights=weights).speedup_macs(digits) < 1.01 * speedup


def test_exchange_is_made_only_where_it_promises_a_gain(digits):
    budget = budget_of(digits, kind="cur", value=0.5)
    compute = fora_schedule(10, 24, 2).compute
    effects = torch.where(compute, 2.0, -1.0)  # opening gains 1, closing costs 2
    assert torch.equal(exchanged(compute, effects, budget, 1.0), compute)
    effects[4, 3], effects[7, 6] = -5.0, 0.5  # one reused cell worth it, one computed cell that is not
    table = exchanged(compute, effects, budget, 1.0)
    assert (table ^ compute).nonzero().tolist() == [[4, 3], [7, 6]]


@pytest.mark.parametrize("num_steps", [5, 10, 20, 50])
def test_interpolation_keeps_share_and_place(num_steps):
    compute = fora_schedule(10, 24, 2).compute
    table = interpolated(compute, num_steps)
    assert table.shape == (num_steps, 24)
    assert table[-1].all()
    assert abs(table.float().mean() - 0.5) <= 1.5 / num_steps
    assert torch.equal(interpolated(compute, 10), compute)
    early = torch.zeros(10, 2, dtype=torch.bool)
    early[6:] = True  # the noisy part alone
    spread = interpolated(early, num_steps)
    assert not spread[: int(0.5 * num_steps)].any()
    assert spread[math.ceil(0.7 * num_steps) :].float().mean() > 0.75


def test_fitting_beats_plain_reuse_and_predicts_sampling(tiny_model, ten_steps):
    generator = torch.Generator().manual_seed(1)
    noise, labels = torch.randn(8, 4, 4, 4, generator=generator), torch.arange(8) % 5
    reference = ReferenceTrajectory.draw(tiny_model, ten_steps, noise, labels, 1.5)
    compute = fora_schedule(10, 4, 2).compute
    fitted = fit(reference, compute, 2)
    schedule = Schedule(compute, weights=fitted.reuse_weights)
    x_0 = generate(tiny_model, ten_steps, labels, noise, 1.5, schedule=schedule)
    assert (x_0 - reference.states[0]).square().mean().item() == pytest.approx(fitted.error, rel=1e-3)
    plain = generate(tiny_model, ten_steps, labels, noise, 1.5, schedule=Schedule(compute))
    plain_error = fit(reference, compute, 0).error
    assert relative_error(plain, x_0) > 1e-3
    assert plain_error == pytest.approx((plain - reference.states[0]).square().mean().item(), rel=1e-3)
    everything = torch.ones(10, 4, dtype=torch.bool)
    assert best_of(reference, [everything, compute], 2, lambda t: t) is everything
    assert best_of(reference, [compute, everything], 2, lambda t: t) is everything


def test_a_step_of_unit_length_matters_equally(tiny_model, ten_steps, tiny_batch):
    """It changes a reused output by what least squares left over, in the mean square, in every direction."""
    noise, labels = tiny_batch
    reference = ReferenceTrajectory.draw(tiny_model, ten_steps, noise, labels, 1.5)
    compute = fora_schedule(10, 4, 2).compute
    fitted = fit(reference, compute, 3)
    scale, used = moving_scale(fitted.gram, fitted.residual), weights_read(compute, 3)
    assert not used[-1].any()
    assert used[2].all()
    assert used[8].sum(-1).tolist() == [1] * 4
    for cell in ((2, 0), (0, 3)):
        change = scale[cell].mT @ fitted.gram[cell] @ scale[cell]
        torch.testing.assert_close(
            change, fitted.residual[cell] * torch.eye(3, dtype=torch.float64), rtol=1e-3, atol=1e-6
        )


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [learning_rate(0.1, update, 40) for update in range(41)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) < 0.1
    assert rates[20] == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
