"""Training on the error of the final image, grown: its plan, its batches, what it reaches, the command."""

import copy
import json
import math
import re

import pytest
import torch
from commands import ROOT, error_line, run
from conftest import tiny_training
from end_to_end_rounds import rounds_of, stop_after, take_step
from ranks import on_two_ranks, run_on_ranks
from safetensors.torch import load_file, save_file

from backbones.loading import load_model
from diffusion import create_diffusion
from end_to_end import search
from end_to_end.rounds import EXCHANGES, GROWTHS, Batch
from models import DiT
from router import Router, Schedule, find_router, load_router, save_router, weights_read
from sampling.loop import Trajectory, generate_seeded
from training.run import Run
from training.settings import EndToEndSettings

SEARCH = 3 * GROWTHS + EXCHANGES
STEPS = SEARCH + 5
POOL_AND_MOMENTS = {"pool": 16, "moments_weight": 1.0}


def own(max_steps: int = STEPS, **others) -> EndToEndSettings:
    defaults = {"max_steps": max_steps, "cfg_scale": 1.0, "search": "grow", "lr": 0.1}
    return EndToEndSettings(**defaults | others)


# ---- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "plan"), [
    (own(20), [4, 4, 4, 5, 3]),
    (own(17), [4, 4, 4, 5, 0]),
    (own(20, terms=0), [4, 4, 4, 8]),
    (own(20, terms=1), [4, 4, 4, 5, 3]),
    (own(20, pool=16, terms=0), [4, 4, 12]),
    (own(20, pool=16), [4, 4, 1, 11]),
])  # fmt: skip
def test_a_plan_is_phases_that_fill_the_run(tiny_model, method, plan):
    rounds = rounds_of(tiny_model, method)
    assert [phase.num_steps for phase in rounds.plan] == plan
    assert rounds.total_steps == sum(plan) == method.max_steps
    places = [rounds._place(step) for step in range(method.max_steps)]
    assert [number for _, number in places] == [number for size in plan for number in range(size)]
    assert [phase for phase, _ in places] == [p for p in rounds.plan for _ in range(p.num_steps)]


@pytest.mark.parametrize(("others", "steps"), [({}, 17), ({"terms": 0}, 17), ({"pool": 16}, 9)])
def test_a_run_that_ends_within_the_search_is_refused(tiny_model, others, steps):
    rounds_of(tiny_model, own(steps, **others))
    said = f"--max-steps {steps - 1} ends within the search, which takes {steps}; give more"
    with pytest.raises(ValueError, match=said):
        rounds_of(tiny_model, own(steps - 1, **others))


@pytest.fixture(scope="module")
def at_step(tiny_model):
    """Rounds and training after any number of train steps of one run."""
    rounds = rounds_of(tiny_model, own())
    training, states = rounds.new_training(), []
    for _ in range(STEPS + 1):
        states.append(training.state.tensors())
        if len(states) <= STEPS:
            take_step(rounds, training)

    def at(step: int):
        training = rounds.new_training()
        training.state.load(states[step])
        assert training.train_steps == step
        return rounds, training

    return at


def test_candidates_grow_to_the_budget_one_after_the_other(at_step):
    for candidate in range(3):
        spent = []
        for growth in range(GROWTHS):
            rounds, training = at_step(candidate * GROWTHS + growth + 1)
            assert training.current == candidate
            spent.append(rounds.budget.spent(training.compute))
        assert spent == sorted(spent)
        budget = rounds.budget
        assert budget.allowed - min(budget.costs) - 3 * 16 * budget.combining < spent[-1] <= budget.allowed
    _, before = at_step(2 * GROWTHS)
    assert torch.equal(before.candidates[:2], training.candidates[:2])  # those before stay as they are
    assert before.candidates[2].sum() == 4  # the next has its first step alone


def test_the_best_is_exchanged_and_then_its_weights_move(at_step):
    _, grown = at_step(3 * GROWTHS)
    _, searched = at_step(SEARCH)
    rounds, trained = at_step(STEPS)
    assert searched.current == 0
    assert torch.equal(searched.candidates[1:], grown.candidates[1:])
    assert (searched.moves == 0).all()
    assert torch.equal(trained.compute, searched.compute)  # the schedule is settled
    assert torch.equal(trained.fitted, searched.fitted)
    assert trained.moves.abs().max() > 0
    assert rounds.budget.spent(trained.compute) <= rounds.budget.allowed
    with pytest.raises(AssertionError, match="the plan has ended"):
        take_step(rounds, trained)


@pytest.mark.parametrize("step", [6, SEARCH + 1])
def test_a_state_goes_on_in_the_same_bits(at_step, step):
    """From within the growing of a candidate, and from among the updates."""
    rounds, training = at_step(step)
    for _ in range(STEPS - step):
        take_step(rounds, training)
    wanted = at_step(STEPS)[1].state.tensors()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in training.state.tensors().items())


def test_the_loss_is_the_logarithm_of_the_error(at_step):
    for step in (0, SEARCH - 1, SEARCH, STEPS - 1):
        update = take_step(*at_step(step))
        assert update.loss.item() == pytest.approx(math.log(update.data_loss), rel=1e-5)


def test_the_error_of_all_ranks_scales_the_gradient(at_step, monkeypatch):
    """The loss is the logarithm of the mean over ranks: their errors are four times this one's here."""
    rounds, plain = at_step(SEARCH)
    alone = take_step(rounds, plain)
    monkeypatch.setattr("common.distributed.mean", lambda one: 4 * one if one.ndim == 2 else one)
    rounds, training = at_step(SEARCH)
    update = take_step(rounds, training)
    torch.testing.assert_close(update.data_loss, 4 * alone.data_loss)
    torch.testing.assert_close(update.loss, alone.loss + math.log(4))
    torch.testing.assert_close(training.moves.grad, plain.moves.grad / 4)


def test_the_learning_rate_falls_over_the_updates(at_step):
    for number in range(5):
        rounds, training = at_step(SEARCH + number)
        take_step(rounds, training)
        assert training.optimizer.param_groups[0]["lr"] == search.learning_rate(0.1, number, 5)


def test_the_best_candidate_is_chosen(at_step, monkeypatch):
    rounds, training = at_step(3 * GROWTHS)
    grown, asked = training.candidates.clone(), []

    def last_of(_reference, schedules, *_):
        asked.append(torch.stack(schedules))
        return schedules[2]

    monkeypatch.setattr(search, "best_of", last_of)
    monkeypatch.setattr(search, "exchanged", lambda compute, *_: compute)
    take_step(rounds, training)
    assert torch.equal(asked[0], grown)
    assert torch.equal(training.compute, grown[2])


def test_an_exchange_that_does_not_help_halves_the_next(at_step, monkeypatch):
    rounds, training = at_step(3 * GROWTHS)
    worse = torch.zeros_like(training.compute)
    worse[-1] = True
    shares, schedules = [], []

    def exchanged(compute, effects, _budget, share):
        assert effects.shape == compute.shape
        shares.append(share)
        schedules.append(compute.clone())
        return worse if len(shares) < 3 else torch.ones_like(compute)

    monkeypatch.setattr(search, "exchanged", exchanged)
    for _ in range(3):
        take_step(rounds, training)
    assert shares == [search.FIRST_EXCHANGE, search.FIRST_EXCHANGE / 2, search.FIRST_EXCHANGE / 4]
    assert torch.equal(schedules[0], schedules[2])
    assert training.compute.all()  # the third one has no error at all, and is kept
    assert training.exchange_share == search.FIRST_EXCHANGE / 4


def test_only_the_weights_that_reuse_reads_move(at_step):
    _, training = at_step(STEPS)
    reuse_weights, compute = training.reuse_weights().detach(), training.compute
    plain = torch.tensor([1.0, 0, 0]).expand(4, 4, 3)
    assert torch.equal(reuse_weights[compute], plain[compute])
    read = weights_read(compute, 3)
    assert (reuse_weights[~compute][~read[~compute]] == 0).all()
    assert (reuse_weights[read] != training.fitted[read]).float().mean() > 0.9
    schedule = training.schedule
    assert torch.equal(schedule.weights, reuse_weights)
    for threshold in (0.02, 0.5, 0.9):  # weights belong to one schedule: no threshold changes it
        assert torch.equal(training.router_to_save.schedule(threshold).compute, compute)


def test_updates_lower_the_error(tiny_model, at_step):
    """On one and the same batch: each update goes down the gradient of what is logged."""
    rounds = rounds_of(tiny_model, own(SEARCH + 40, lr=0.02))
    training, generators = rounds.new_training(), rounds.generators(0)
    training.state.load(at_step(SEARCH)[1].state.tensors())
    batch = Batch(rounds._reference(generators), generators)
    losses = [rounds.plan[-1].step(training, batch, number).data_loss.item() for number in range(15)]
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("terms", [0, 1])
def test_fewer_terms(tiny_model, terms):
    rounds = rounds_of(tiny_model, own(SEARCH + 1, terms=terms))
    training = rounds.new_training()
    for _ in range(SEARCH + 1):
        take_step(rounds, training)
    router = training.router_to_save
    assert rounds.name == ("end-to-end+forecast" if terms else "end-to-end")
    assert (router.weights is None) == (terms == 0)
    if terms:
        assert router.weights.shape == (4, 4, 1)


@pytest.mark.parametrize(("kind", "value", "num_steps"), [("speedup", 2, 6), ("cur", 0.375, 4)])
def test_the_target_is_met(train_tiny, tiny_model, kind, value, num_steps):
    said = []
    target = {f"target_{kind}": value, "num_sampling_steps": str(num_steps)}
    folder = train_tiny(own(SEARCH), show=said.append, **target)
    assert not any("the target was not met" in line for line in said)
    schedule = load_router(folder).schedule(0.1)
    if kind == "cur":
        assert schedule.cur == value
    else:
        assert value <= schedule.speedup_macs(tiny_model) < 1.1 * value


def test_a_schedule_of_other_steps_as_a_start(tiny_model, tmp_path):
    compute = torch.tensor([[1, 0, 1, 0]] * 4, dtype=torch.bool)
    save_router(tmp_path / "r.safetensors", Router.from_schedule(Schedule(compute)), model="DiT-XL/2")
    rounds = rounds_of(tiny_model, own(10, init=str(tmp_path / "r.safetensors")), 6)
    assert torch.equal(rounds.warm_start, search.interpolated(Schedule(compute).compute, 6))
    assert [phase.num_steps for phase in rounds.plan] == [GROWTHS, EXCHANGES, 1]
    training = rounds.new_training()
    assert len(training.candidates) == 1
    for _ in range(9):
        take_step(rounds, training)
    assert 1.5 <= training.schedule.speedup_macs(tiny_model) < 1.6


def test_options_for_scale(tiny_model):
    """Windows, a part of the cells, kept activations."""
    rounds = rounds_of(tiny_model, own(SEARCH + 2, window=2, open_share=0.5, keep_activations=True))
    training = rounds.new_training()
    for _ in range(SEARCH + 2):
        update = take_step(rounds, training)
    assert training.reuse_weights().isfinite().all()
    assert update.loss.isfinite()


def test_a_share_of_the_cells_is_asked_about(tiny_model):
    rounds = rounds_of(tiny_model, own(open_share=0.5), 8)
    training, counts = rounds.new_training(), []
    training.compute = rounds.budget.skeletons(8, 1.0)[0]
    for number in range(8):
        training.train_steps = number
        generators = rounds.generators(number)
        effects, _ = rounds._effects(training, Batch(rounds._reference(generators), generators))
        assert effects[-1].isinf().all()
        counts.append(effects[:-1].isfinite().sum().item())
    assert 8 * 28 * 0.35 < sum(counts) < 8 * 28 * 0.65
    assert len(set(counts)) > 1


# ---- batches by importance -------------------------------------------------------------------------


def test_batches_of_a_pool(tiny_model):
    """Rounds share a pool, which is drawn anew after some; a batch holds its samples, weighed."""
    rounds = rounds_of(tiny_model, own(40, **POOL_AND_MOMENTS))
    first = rounds._pool_samples(0, list(range(16)))
    for number in (0, 1, 31):
        reference = rounds._draw_from_pool(number)
        found = [(first.noise == noise).flatten(1).all(1).nonzero().item() for noise in reference.noise]
        assert len(set(found)) == 4
        probabilities = rounds._pool[1]
        assert probabilities.sum().item() == pytest.approx(4)
        expected = 4 / 16 / probabilities[found]
        torch.testing.assert_close(reference.importance, expected.float())
    rounds._draw_from_pool(32)
    assert rounds._pool[0] == 32
    assert not torch.equal(rounds._pool[1], probabilities)


def test_a_pool_is_drawn_by_its_errors(tiny_model):
    """Of the regular schedule of the budget, whatever was trained; two processes agree on it."""
    rounds = rounds_of(tiny_model, own(40, **POOL_AND_MOMENTS))
    probabilities = rounds._inclusion(0)
    again = rounds_of(tiny_model, own(40, **POOL_AND_MOMENTS))._inclusion(0)
    assert torch.equal(probabilities, again)
    assert probabilities.max() > 1.1 * probabilities.min()
    reference = rounds._pool_samples(0, list(range(16)))
    compute = rounds.budget.skeletons(4, 1.0, warps=(1.0,))[0]
    fitted = search.fit(rounds._pool_samples(0, [0, 1, 2, 3]), compute, 3)
    x_0 = list(reference.rollout(search.GatedCache(compute.float(), fitted.reuse_weights.float())))[-1][1]
    errors = (x_0 - reference.states[0]).square().flatten(1).mean(1)
    assert probabilities.argsort().tolist() == errors.argsort().tolist()


def test_moments_are_trained_on(tiny_model):
    """They raise the logged loss and move the weights; the data loss is the MSE alone."""
    both = []
    for weight in (0.0, 1.0):
        rounds = rounds_of(tiny_model, own(20, pool=16, moments_weight=weight))
        training = rounds.new_training()
        updates = [take_step(rounds, training) for _ in range(12)]
        both.append((updates, training))
    (without, plain), (with_moments, moved) = both
    for one, other in zip(without[:9], with_moments, strict=False):  # the search does not know of them
        assert torch.equal(one.loss, other.loss)
    assert torch.equal(without[9].data_loss, with_moments[9].data_loss)
    assert with_moments[9].loss > without[9].loss + 0.01
    assert not torch.equal(plain.moves, moved.moves)


def test_the_error_of_broken_weights_is_one_line(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.blocks[1].mlp.fc1.weight[0] = 3e38
    rounds = rounds_of(model, own())
    with pytest.raises(ValueError, match="the error of x_0 is nan at train step 1; check the"):
        take_step(rounds, rounds.new_training())


# ---- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[{}, POOL_AND_MOMENTS], ids=["batches", "pool"])
def whole(request, tiny_model, tmp_path_factory):
    """What the settings have in addition, and the folder of a whole run with them."""
    with tiny_training(tiny_model, tmp_path_factory.mktemp("whole")) as train:
        return request.param, train(own(**request.param), target_speedup=1.5)


def test_killed_and_resumed_ends_bit_for_bit_the_same(whole, train_tiny, monkeypatch):
    """Killed among the exchanges, or among the updates of a run with a pool."""
    more, folder = whole
    stop, whole = 12 if more else 14, load_router(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "step_done", stop_after(stop))
        with pytest.raises(KeyboardInterrupt):
            train_tiny(own(STEPS, **more), "parts", target_speedup=1.5)
    resumed = load_router(train_tiny(own(STEPS, **more), "parts", target_speedup=1.5, resume="auto"))
    assert torch.equal(whole.logits, resumed.logits)
    assert torch.equal(whole.weights, resumed.weights)
    tensors = [load_file(find_router(router.info["path"])) for router in (whole, resumed)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


TRAIN = ["train_router.py", "--method", "end-to-end", "--model", "DiT-digits/2", "--num-sampling-steps", 4]
TRAIN += [
    "--search",
    "grow",
    "--cfg-scale",
    1,
    "--global-batch-size",
    2,
    "--target-speedup",
    1.7,
    "--device",
    "cpu",
]


@pytest.mark.parametrize(("cfg_scale", "trajectories"), [(1.5, 1), (1.0, 2)])
def test_a_batch_is_counted_in_rows_of_a_forward_pass(train_tiny, monkeypatch, cfg_scale, trajectories):
    predict, met = DiT.predict, set()

    def noted(model, x, *others):
        met.add(len(x))
        return predict(model, x, *others)

    monkeypatch.setattr(DiT, "predict", noted)
    folder = train_tiny(own(SEARCH, cfg_scale=cfg_scale), target_speedup=1.5, global_batch_size=2)
    assert met == {2}
    assert load_router(folder).info["settings"]["trajectories"] == trajectories


SMALL = [3 if argument == 4 else argument for argument in TRAIN] + ["--keep-activations"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    run(*SMALL, "--results-dir", results, "--max-steps", STEPS, "--ckpt-every", STEPS)
    return results


def router_in(results):
    return load_router(find_router(next(results.glob("0*"))))


@pytest.mark.slow
def test_what_a_run_leaves(whole_run):
    (folder,) = whole_run.iterdir()
    assert folder.name == "000-DiT-digits-2-T3-end-to-end+forecast-seed42"
    router = router_in(whole_run)
    assert router.info["method"] == "end-to-end+forecast"
    assert router.info["train_steps"] == STEPS
    assert router.weights.shape == (3, 24, 3)
    schedule, model = router.schedule(0.1), load_model("DiT-digits/2")
    assert 1.7 <= schedule.speedup_macs(model) < 1.75
    assert schedule.speedup_macs(model) == pytest.approx(router.info["speedup_macs"])
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["train_steps"] for row in metrics] == [5, 10, 15, 20]
    assert metrics[-1]["data_loss"] < metrics[0]["data_loss"]
    assert (folder / "schedule.png").exists()


@pytest.mark.slow
def test_router_with_weights_keeps_to_its_format(whole_run, tmp_path):
    router = router_in(whole_run)
    save_router(tmp_path / "again.safetensors", router)
    again = load_router(tmp_path / "again.safetensors")
    assert torch.equal(again.weights, router.weights)
    with pytest.raises(ValueError, match="the released layout has no place for weights"):
        save_router(tmp_path / "released.pt", router)
    assert not (tmp_path / "released.pt").exists()
    line = error_line("router.py", tmp_path / "again.safetensors", "--export", tmp_path / "x.pt")
    assert "no place for weights" in line


@pytest.mark.slow
def test_two_ranks_train_the_same_router(whole, train_tiny, tmp_path):
    """The same schedule; rounding moves the weights of nearly collinear outputs, but hardly their error."""
    more, one = whole
    on_two_ranks(
        lambda processes: train_tiny(own(**more), "two", processes=processes, target_speedup=1.5), tmp_path
    )
    (two,) = (tmp_path / "two").iterdir()
    assert torch.equal(load_router(one).logits, load_router(two).logits)
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    for row, other in zip(*rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert row["data_loss"] == pytest.approx(other["data_loss"], rel=1e-2)


@pytest.mark.slow
def test_two_processes_train_the_same_router(tmp_path):
    arguments = [*SMALL, "--max-steps", 12, "--pool", 8, "--moments-weight", 1]
    run(*arguments, "--results-dir", tmp_path / "one")
    run_on_ranks(2, *arguments, "--results-dir", tmp_path / "two")
    one, two = router_in(tmp_path / "one"), router_in(tmp_path / "two")
    assert torch.equal(one.logits, two.logits)
    # Stored outputs are nearly collinear: rounding moves weights, but hardly what they make.
    model, chain, labels = load_model("DiT-digits/2"), create_diffusion("3"), torch.arange(20) % 10
    schedules = (None, one.schedule(0.1), two.schedule(0.1))
    plain, from_one, from_two = (
        generate_seeded(Trajectory(model, chain, schedule=schedule), labels, 7) for schedule in schedules
    )
    assert (from_one - from_two).square().mean() < 1e-2 * (from_one - plain).square().mean()


@pytest.mark.slow
def test_bfloat16_trains(tmp_path):
    options = ["--pool", 4, "--moments-weight", 1, "--window", 2, "--open-share", 0.5]
    run(*SMALL, *options, "--precision", "bf16", "--results-dir", tmp_path, "--max-steps", 11)
    assert router_in(tmp_path).weights.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-speedup", 3.645], "leaves less than the first step"),
        (["--max-steps", 16], "--max-steps 16 ends within the search, which takes 17"),
        (["--init", "nowhere.safetensors"], "router nowhere.safetensors does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, arguments, message):
    assert message in error_line(*TRAIN, "--results-dir", tmp_path, *arguments)
    assert not list(tmp_path.glob("*/checkpoints/*"))


@pytest.mark.parametrize("search", ["grow", "linear"])
def test_broken_weights_are_one_line(tmp_path, search):
    state = load_file(ROOT / "examples" / "digits" / "dit.safetensors")
    state["blocks.3.mlp.fc1.weight"][0] = 3e38  # finite, or the checkpoint would be refused
    save_file(state, tmp_path / "broken.safetensors")
    arguments = ["--search", search, "--ckpt", tmp_path / "broken.safetensors"]
    line = error_line(*TRAIN, *arguments, "--results-dir", tmp_path / "r")
    assert "the error of x_0 is nan at train step 1" in line
    assert not list(tmp_path.glob("r/*/checkpoints/*"))


def test_wrong_flags_are_refused(tmp_path):
    base = [argument for argument in TRAIN if argument not in ("--target-speedup", 1.7)]
    text = run(*base, "--results-dir", tmp_path, status=2)
    assert "needs --target-speedup or --target-cur" in text
    assert "--pool 1 is less than a batch" in run(*TRAIN, "--pool", 1, status=2)
    assert "0 is outside (0, 1]" in run(*TRAIN, "--open-share", 0, status=2)
    useless = ["--moments-weight", 1, "--terms", 0, "--max-steps", 1]
    assert "--moments-weight has no effect with --terms 0" in run(*TRAIN, *useless, status=2)
    assert "-1 is no weight" in run(*TRAIN, "--moments-weight", -1, status=2)
    assert "invalid choice" in run(*TRAIN, "--terms", 4, status=2)
    with_another = ["train_router.py", "--method", "harmonica", "--terms", 2, "--target-cur", 7]
    text = run(*with_another, "--model", "DiT-digits/2", "--results-dir", tmp_path, status=2)
    assert re.search("--target-cur 7 is outside", text)
    assert not list(tmp_path.iterdir())
