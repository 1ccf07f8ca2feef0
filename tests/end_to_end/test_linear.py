"""The linearised error of x_0: its tables, the schedules and weights that follow, and training from them."""

import copy
import json

import pytest
import torch
from commands import run
from end_to_end_rounds import rounds_of, stop_after, take_step
from ranks import on_two_ranks

from backbones.loading import load_model
from cache import GatedCache
from diffusion import create_diffusion
from end_to_end import linear, search
from end_to_end.linear import Linearised
from end_to_end.trajectory import ReferenceTrajectory
from router import find_router, load_router
from schedules.any_speed import fit_cells, moved
from training.settings import EndToEndSettings

PROBES = 2


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(k) for k in range(n)]


@pytest.fixture(scope="module", params=[1.0, 1.5], ids=["plain", "guided"])
def recorded(request, tiny_model):
    """A reference of four steps in float64, and its tables."""
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model, labels = copy.deepcopy(tiny_model).double(), torch.tensor([0, 3, 1])
    reference = ReferenceTrajectory.draw(model, create_diffusion("4"), noise, labels, request.param)
    return reference, *linear.record(reference, generators(3), PROBES)


def table(num_terms: int = 3, rows: int = 40, seed: int = 0) -> Linearised:
    """Random tables of 5 steps and 3 branches, whose outputs resemble each other as neighbours in time do."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(3, 5, 64, generator=generator, dtype=torch.float64).cumsum(1)
    gradients = torch.randn(rows, 3, 5, 64, generator=generator, dtype=torch.float64)
    projections = torch.einsum("rbiv,bsv->rbis", gradients, outputs).float().triu()
    return Linearised(outputs @ outputs.mT / 64, projections, num_terms)


def budget_of(allowed: float, costs: tuple[float, ...] = (1.0, 2.0, 1.0)) -> search.Budget:
    return search.Budget(torch.tensor(costs, dtype=torch.float64), 0.0, 3, allowed)


# ---- the tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_a_cell_is_the_derivative_in_its_gate(recorded, recompute):
    """A gate that closes moves the output from the computed one to its reuse; the store stays as it is."""
    reference, gram, _ = recorded
    own_gram, projections = linear.record(reference, generators(3), PROBES, recompute)
    torch.testing.assert_close(own_gram, gram)
    tables = Linearised(gram, projections.flatten(0, 1), 3)
    weights = torch.zeros(4, 4, 3, dtype=torch.float64)
    for step in range(3):
        for branch in range(4):
            own = tables.cell(step, branch, tuple(range(step + 1, 4))[:3])[1].weights
            weights[step, branch, : len(own)] = own
    gates = torch.ones(4, 4, 3, dtype=torch.float64, requires_grad=True)
    cache = GatedCache(gates, weights, torch.ones(4, 4, dtype=torch.bool), store_gradient=False)
    (deviations,) = reference.deviations(cache)
    drawing = generators(3)
    for probe in range(PROBES):
        v = torch.stack([torch.randn(deviations.shape[1], generator=one) for one in drawing]).double()
        (of_gates,) = torch.autograd.grad((v * deviations).sum(), gates, retain_graph=True)
        for step in range(3):
            for branch in range(4):
                row = tables.cell(step, branch, tuple(range(step + 1, 4))[:3])[0]
                expected = -of_gates[step, branch].float()
                torch.testing.assert_close(row.view(3, PROBES)[:, probe], expected, rtol=1e-4, atol=1e-6)


def test_gram_is_of_the_branch_outputs(recorded):
    reference, gram, _ = recorded
    outputs: dict = {}

    class Noted:
        step, computed = 3, None

        def __call__(self, branch, run):
            outputs[self.step, branch] = run()
            return outputs[self.step, branch]

        def snapshot(self):
            return None

        def restore(self, _):
            return None

    list(reference.rollout(Noted()))
    for branch in range(4):
        for step, other in ((0, 0), (0, 3), (2, 1)):
            expected = (outputs[step, branch] * outputs[other, branch]).mean()
            torch.testing.assert_close(gram[branch, step, other], expected.detach())


# ---- schedules -------------------------------------------------------------------------------------


def test_cells_are_closed_in_the_order_of_what_they_cost_x_0():
    tables, budget = table(), budget_of(9.0)
    compute = torch.ones(5, 3, dtype=torch.bool)
    for cell in tables.closing_order(budget):
        assert budget.spent(compute) > budget.allowed
        added = {}
        for step in range(4):
            for branch in range(3):
                if compute[step, branch]:
                    closed = compute.clone()
                    closed[step, branch] = False
                    added[step, branch] = (tables.error(closed) - tables.error(compute)) / budget.costs[
                        branch
                    ]
        assert cell == min(added, key=added.get)
        compute[cell] = False
    assert budget.spent(compute) <= budget.allowed
    assert compute[-1].all()


def test_a_schedule_of_a_higher_speed_closes_more_of_the_same_order():
    tables = table()
    fast, slow = (tables.closing_order(budget_of(allowed)) for allowed in (6.0, 12.0))
    assert fast[: len(slow)] == slow
    assert len(fast) > len(slow)


def test_errors_that_cancel_are_closed_together():
    """Two branches whose errors are opposite: to close both costs nothing."""
    tables = table()
    projections = tables.projections.clone()
    projections[:, 1] = -projections[:, 0]
    gram = tables.gram.clone()
    gram[1] = gram[0]
    both = Linearised(gram, projections, 3)
    compute = torch.ones(5, 3, dtype=torch.bool)
    compute[2, :2] = False
    assert both.error(compute) < 1e-9 < both.error(compute | torch.tensor([True, False, False]))


# ---- weights ---------------------------------------------------------------------------------------


def test_an_output_that_others_make_up_is_met_exactly():
    tables = table()
    gram = tables.gram.clone()
    mix = torch.tensor([2.0, -1.0], dtype=torch.float64)  # output 0 of branch 0 is 2 * output 1 - output 2
    gram[0, 0, 1:] = gram[0, 1:, 0] = mix @ gram[0, 1:3, 1:]
    gram[0, 0, 0] = mix @ gram[0, 1:3, 1:3] @ mix
    _, fit = Linearised(gram, tables.projections, 3).cell(0, 0, (1, 2))
    torch.testing.assert_close(fit.weights, mix, rtol=1e-3, atol=1e-3)


def test_reuse_as_it_is_without_terms():
    tables = table(num_terms=0)
    error, fit = tables.cell(1, 2, (3,))
    assert fit.weights.tolist() == [1]
    torch.testing.assert_close(error, tables.projections[:, 2, 1, 3] - tables.projections[:, 2, 1, 1])


def errors_with(tables: Linearised, compute: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`v . x_0` (R,) of a schedule with any weights, from the tables alone."""
    total = torch.zeros(len(tables.projections), dtype=torch.float64)
    for branch in range(tables.num_branches):
        stored: list[int] = []
        for step in reversed(range(tables.num_steps)):
            if compute[step, branch] or not stored:
                stored = [step, *stored][:3]
                continue
            own = tables.projections[:, branch, step].double()
            total = total + own[:, stored] @ weights[step, branch, : len(stored)] - own[:, step]
    return total


def test_weights_solved_at_once_have_the_least_error():
    tables = table(rows=60)
    compute = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    moves, expected = tables.solve(compute, prior=0.0)
    still, alone = tables.solve(compute, prior=1e12)
    assert still.abs().max() < 1e-6
    assert alone == pytest.approx(tables.error(compute), rel=1e-4)
    assert expected < 0.9 * alone
    fitted, scale = fit_cells(tables.gram, compute, 3)

    def error_after(moves: torch.Tensor) -> torch.Tensor:
        return errors_with(tables, compute, moved(fitted, scale, moves)).square().mean()

    assert error_after(moves).item() == pytest.approx(expected, rel=1e-4)
    gradients = []
    for one in (moves, torch.zeros_like(moves)):
        own = one.clone().requires_grad_()
        gradients.append(torch.autograd.grad(error_after(own), own)[0].abs().max())
    assert gradients[0] < 1e-3 * gradients[1]
    assert (moves[compute] == 0).all()


# ---- training --------------------------------------------------------------------------------------


def own(max_steps: int = 5, **others) -> EndToEndSettings:
    return EndToEndSettings(**{"max_steps": max_steps, "cfg_scale": 1.0, "search_samples": 8} | others)


def test_one_step_of_search_and_then_updates(tiny_model):
    rounds = rounds_of(tiny_model, own())
    assert [phase.num_steps for phase in rounds.plan] == [1, 4]
    training = rounds.new_training()
    take_step(rounds, training)
    compute = training.compute.clone()
    assert rounds.budget.spent(compute) <= rounds.budget.allowed
    assert 1.5 <= training.schedule.speedup_macs(tiny_model) < 1.6
    assert (training.moves == 0).all()
    for _ in range(4):
        take_step(rounds, training)
    assert torch.equal(training.compute, compute)
    assert training.moves.abs().max() > 0


def test_the_search_ends_a_run_without_weights(tiny_model):
    rounds = rounds_of(tiny_model, own(40, terms=0))
    assert rounds.total_steps == 1
    training = rounds.new_training()
    take_step(rounds, training)
    assert training.router_to_save.weights is None
    assert 1.5 <= training.schedule.speedup_macs(tiny_model) < 1.7


def test_the_schedule_beats_regular_ones(tiny_model):
    """On fresh noise, with weights fitted alike."""
    rounds = rounds_of(tiny_model, own(1), 8, speedup=1.6)
    training = rounds.new_training()
    take_step(rounds, training)
    reference = rounds._reference(rounds.generators(99))
    found = search.fit(reference, training.compute, 3).error
    regular = [search.fit(reference, one, 3).error for one in rounds.budget.skeletons(8, 1.0)]
    assert found < 0.8 * min(regular)


def test_killed_and_resumed_ends_bit_for_bit_the_same(train_tiny, monkeypatch):
    whole = load_router(train_tiny(own(), target_speedup=1.5))
    with monkeypatch.context() as patch:
        patch.setattr("training.run.Run.step_done", stop_after(3))
        with pytest.raises(KeyboardInterrupt):
            train_tiny(own(), "parts", target_speedup=1.5)
    resumed = load_router(train_tiny(own(), "parts", target_speedup=1.5, resume="auto"))
    assert torch.equal(whole.logits, resumed.logits)
    assert torch.equal(whole.weights, resumed.weights)


@pytest.mark.slow
def test_two_ranks_train_the_same_router(train_tiny, tmp_path):
    one = train_tiny(own(), target_speedup=1.5)
    on_two_ranks(
        lambda processes: train_tiny(own(), "two", processes=processes, target_speedup=1.5), tmp_path
    )
    (two,) = (tmp_path / "two").iterdir()
    assert torch.equal(load_router(one).logits, load_router(two).logits)
    losses = [
        [json.loads(line)["data_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


TRAIN = ["train_router.py", "--method", "end-to-end", "--model", "DiT-digits/2", "--num-sampling-steps", 3]
TRAIN += ["--cfg-scale", 1, "--global-batch-size", 4, "--target-speedup", 1.7, "--device", "cpu"]
TRAIN += ["--search-samples", 4]


@pytest.mark.slow
def test_command_under_guidance_in_bfloat16(tmp_path):
    options = ["--pool", 8, "--moments-weight", 1, "--window", 2, "--precision", "bf16", "--max-steps", 3]
    run(*TRAIN, *options, "--cfg-scale", 1.5, "--results-dir", tmp_path)
    router = load_router(find_router(next(tmp_path.glob("0*"))))
    assert router.weights.isfinite().all()
    assert 1.7 <= router.schedule(0.1).speedup_macs(load_model("DiT-digits/2")) < 1.75
