"""One router for every speed-up: its schedules, its weights, its file, its training, and the commands."""

import json

import pytest
import torch
from commands import error_line, run
from end_to_end_rounds import stop_after
from safetensors.torch import load_file, save_file

from backbones.loading import load_model
from diffusion import create_diffusion
from end_to_end import any_speed as training
from router import find_router, load_router, save_router
from sampling.loop import Trajectory, generate_seeded
from schedules.any_speed import AnySpeed, closed_cells, fit_cell, fit_cells, moved, speedup_macs
from schedules.baselines import fora_schedule
from training.settings import EndToEndSettings

SPEEDUPS = (1.2, 2.0, 3.0)


def small(seed: int = 0) -> AnySpeed:
    """Six steps, four branches, three terms."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(4, 6, 64, generator=generator, dtype=torch.float64).cumsum(1)
    cells = [(step, branch) for step in range(5) for branch in range(4)]
    order = torch.tensor(cells)[torch.randperm(20, generator=generator)]
    moves = 0.3 * torch.randn(3, 6, 4, 3, generator=generator)
    return AnySpeed(order, outputs @ outputs.mT / 64, moves, SPEEDUPS, (100, 200, 100, 200), 60, 2)


def test_a_schedule_closes_no_more_than_its_speed_up_asks_for():
    router = small()
    before = 0
    for speedup in (1.0, 1.3, 1.7, 2.2, 2.9, 3.0):
        schedule = router.schedule(speedup)
        closed = int((~schedule.compute).sum())
        cells = [tuple(cell) for cell in router.order.tolist()]
        assert torch.equal(schedule.compute, closed_cells(cells[:closed], 6, 4))
        assert schedule.speedup_macs(router) >= speedup
        if closed:
            assert speedup_macs(closed_cells(cells[: closed - 1], 6, 4), 3, router) < speedup
        assert closed >= before
        before = closed


@pytest.mark.parametrize("speedup", [0.5, 3.1, float("nan")])
def test_a_speed_up_that_is_not_offered_is_refused(speedup):
    with pytest.raises(ValueError, match="is not offered; take one from 1.2 to 3"):
        small().schedule(speedup)


def test_weights_are_those_of_least_squares_on_the_stored_outputs():
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(5, 200, generator=generator, dtype=torch.float64).cumsum(0)
    fit = fit_cell(outputs @ outputs.T / 200, 0, (1, 3, 4))
    wanted = torch.linalg.lstsq(outputs[[1, 3, 4]].T, outputs[0]).solution
    torch.testing.assert_close(fit.weights, wanted, rtol=1e-4, atol=1e-4)
    # A move of unit length raises the squared error by the residual of the fit.
    move = fit.scale @ torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    left = (outputs[0] - fit.weights @ outputs[[1, 3, 4]]).square().mean()
    after = (outputs[0] - (fit.weights + move) @ outputs[[1, 3, 4]]).square().mean()
    torch.testing.assert_close(after, 2 * left, rtol=1e-3, atol=0)


def test_moves_are_interpolated_in_the_logarithm_of_the_speed_up():
    router = small()
    for number, speedup in enumerate(SPEEDUPS):
        torch.testing.assert_close(router.interpolated_moves(speedup), router.moves[number])
    middle = router.interpolated_moves((1.2 * 2.0) ** 0.5)
    torch.testing.assert_close(middle, (router.moves[0] + router.moves[1]) / 2)
    torch.testing.assert_close(router.interpolated_moves(1.05), router.moves[0])
    schedule = router.schedule(2.0)
    weights, scale = fit_cells(router.gram, schedule.compute, 3)
    torch.testing.assert_close(schedule.weights, moved(weights, scale, router.moves[1].double()).float())
    assert (schedule.weights[schedule.compute] == torch.tensor([1.0, 0, 0])).all()


def test_its_file(tmp_path):
    router = small()
    save_router(tmp_path / "r.safetensors", router.router(), model="m", method="end-to-end+any-speed")
    again = AnySpeed.of_router(
        load_router(tmp_path / "r.safetensors", model="m", num_steps=6, num_branches=4)
    )
    for speedup in (1.3, 1.7, 2.9):
        one, other = router.schedule(speedup), again.schedule(speedup)
        assert torch.equal(one.compute, other.compute)
        torch.testing.assert_close(one.weights, other.weights, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="r.safetensors is for every speed-up from 1.2 to 3 by MACs; give"):
        load_router(tmp_path / "r.safetensors").schedule(0.1)
    assert "speedups" in run("router.py", tmp_path / "r.safetensors")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors, _: tensors.pop("gram"),
        lambda _, info: info.pop("branch_macs"),
        lambda tensors, _: tensors["moves"].mul_(float("nan")),
        lambda tensors, _: tensors.update(moves=tensors["moves"][:1].clone()),
        lambda tensors, _: tensors["order"][0].fill_(9),
        lambda tensors, _: tensors["order"][1].copy_(tensors["order"][0]),
        lambda _, info: info.update(speedups="[3.0, 2.0, 1.2]"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, spoil):
    file = tmp_path / "r.safetensors"
    save_router(file, small().router())
    tensors, info = load_file(file), {"version": "1", "num_steps": "6", "num_branches": "4"}
    plain = small().router().info
    info |= {name: json.dumps(value) for name, value in plain.items()}
    spoil(tensors, info)
    save_file(tensors, file, metadata=info)
    with pytest.raises(ValueError, match="r.safetensors"):
        load_router(file)


def test_its_size_for_the_largest_model():
    """DiT-XL/2 at T = 50 in less than a megabyte."""
    order = torch.tensor([(step, branch) for step in range(49) for branch in range(56)])
    gram, moves = torch.zeros(56, 50, 50), torch.zeros(training.ANCHORS, 50, 56, 3)
    router = AnySpeed(order, gram, moves, training.anchors(9.0), (1,) * 56, 1, 1).router()
    assert sum(one.nbytes for one in (*router.tensors.values(), router.logits)) < 1_000_000


def test_anchors_end_at_what_the_steps_allow():
    assert training.anchors(9.0)[0] == training.LEAST
    assert training.anchors(9.0)[-1] == training.MOST
    assert training.anchors(1.5)[-1] == 1.5
    with pytest.raises(ValueError, match="the steps allow a speed-up of 1.15 at most"):
        training.anchors(1.15)


# ---- training --------------------------------------------------------------------------------------


def own(**others) -> EndToEndSettings:
    settings = {"max_steps": 6, "cfg_scale": 1.0, "any_speed": True, "search_samples": 8}
    return EndToEndSettings(**settings | others)


def test_killed_and_resumed_ends_bit_for_bit_the_same(train_tiny, tiny_model, monkeypatch):
    setting = {"num_sampling_steps": "6"}
    whole = load_router(train_tiny(own(), **setting))
    with monkeypatch.context() as patch:
        patch.setattr("training.run.Run.step_done", stop_after(3))
        with pytest.raises(KeyboardInterrupt):
            train_tiny(own(), "parts", **setting)
    resumed = load_router(train_tiny(own(), "parts", resume="auto", **setting))
    assert whole.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(whole.tensors[name], resumed.tensors[name]) for name in whole.tensors)
    router = AnySpeed.of_router(whole)
    assert router.moves.abs().max() > 0
    for speedup in (1.25, 2.0, router.speedups[-1]):
        assert router.schedule(speedup).speedup_macs(tiny_model) >= speedup


TRAIN = ["train_router.py", "--method", "end-to-end", "--model", "DiT-digits/2", "--num-sampling-steps", 4]
TRAIN += ["--cfg-scale", 1, "--global-batch-size", 4, "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    short = ["--max-steps", 3, "--search-samples", 4]
    run(*TRAIN, "--any-speed", *short, "--keep-activations", "--results-dir", folder)
    return find_router(next(folder.glob("0*")))


SAMPLE = ["sample.py", "--model", "DiT-digits/2", "--num-sampling-steps", 4, "--cfg-scale", 1, "--repeats", 0]
SAMPLE += ["--accelerate-method", "dynamiclayer", "--path"]


def test_sampling_at_a_speed_up(trained, tmp_path):
    text = run(*SAMPLE, trained, "--speedup", 1.7, "--output", tmp_path / "x.png")
    assert "one router for every speed, at 1.7x" in text
    assert 1.7 <= float(text.split("theoretical speed-up ")[1].split("x")[0]) < 1.75


def test_what_cannot_be_is_one_line(trained, tmp_path):
    output = ["--output", tmp_path / "x.png"]
    for arguments, message in (
        ([trained], "is for every speed-up from 1.2 to"),
        ([trained, "--speedup", 9], "speed-up 9 is not offered; take one from 1.2 to"),
        ([trained, "--speedup", 2, "--thres", 0.1], "--speedup and --thres exclude each other"),
    ):
        assert message in error_line(*SAMPLE, *arguments, *output)
    shipped = [3 if one == 4 else one for one in SAMPLE]
    shipped[shipped.index(3)] = 10
    assert "is of one speed-up; leave out --speedup 2" in error_line(
        *shipped, "digits-T10-1.96x", "--speedup", 2, *output
    )
    assert not (tmp_path / "x.png").exists()
    for flags, message in (
        (["--target-speedup", 2], "--any-speed and a target exclude each other"),
        (["--search", "grow"], "--any-speed and --search grow exclude each other"),
        (["--terms", 0], "--any-speed needs weights of reuse"),
    ):
        assert message in run(*TRAIN, "--any-speed", *flags, "--results-dir", tmp_path, status=2)


def test_the_router_that_ships():
    """It keeps its speed-ups, and its errors rise with them from far below those of FORA."""
    model, labels = load_model("DiT-digits/2"), torch.arange(40) % 10
    router = AnySpeed.of_router(load_router("digits-T20", "DiT-digits/2", 20, model.num_branches))

    def sampled(schedule) -> torch.Tensor:
        return generate_seeded(Trajectory(model, create_diffusion("20"), schedule=schedule), labels, 7)

    uncached, errors = sampled(None), []
    for speedup in (1.3, 2.0, 3.5):
        schedule = router.schedule(speedup)
        assert speedup <= schedule.speedup_macs(model) < 1.01 * speedup
        errors.append((sampled(schedule) - uncached).square().mean().item())
    assert errors == sorted(errors)
    fora = sampled(fora_schedule(20, model.num_branches, 2))
    assert errors[1] < 0.1 * (fora - uncached).square().mean()
