"""Training on the error of the final image: the command, its checkpoints, what it reaches and refuses."""

import json
import math
import re

import pytest
import torch
from commands import ROOT, error_line, run, torchrun
from safetensors.torch import load_file, save_file

from backbones.loading import load_model
from diffusion import create_diffusion
from end_to_end.rounds import EndToEndTraining
from router import find_router, load_router, save_router
from sampling.loop import Trajectory, generate_seeded
from schedules.baselines import fora_schedule
from schedules.calibrate import calibrated
from training.run import Run

TRAIN = ["train_router.py", "--method", "end-to-end", "--model", "DiT-digits/2", "--num-sampling-steps", 4]
TRAIN += ["--cfg-scale", 1, "--global-batch-size", 2, "--target-speedup", 1.7, "--device", "cpu"]
STEPS, EVERY = 22, 5  # 12 of growing, 5 of exchanging, 5 updates; checkpoints fall into all of them


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    run(*TRAIN, "--results-dir", results, "--max-steps", STEPS, "--ckpt-every", EVERY)
    return results


def router_in(results):
    return load_router(find_router(next(results.glob("0*"))))


def test_what_a_run_leaves(uninterrupted):
    (folder,) = uninterrupted.iterdir()
    assert folder.name == "000-DiT-digits-2-T4-end-to-end+forecast-seed42"
    router = router_in(uninterrupted)
    assert router.info["method"] == "end-to-end+forecast"
    assert router.info["train_steps"] == STEPS
    assert router.weights.shape == (4, 24, 3)
    schedule, model = router.schedule(0.1), load_model("DiT-digits/2")
    assert schedule.speedup_macs(model) == pytest.approx(router.info["speedup_macs"])
    assert schedule.speedup_macs(model) >= 1.7
    for threshold in (0.02, 0.5, 0.9):  # weights belong to one schedule: no threshold changes it
        assert torch.equal(router.schedule(threshold).compute, schedule.compute)
    plain = torch.tensor([1.0, 0, 0]).expand(4, 24, 3)
    assert torch.equal(router.weights[schedule.compute], plain[schedule.compute])
    assert not torch.equal(router.weights, plain)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["train_steps"] for row in metrics] == [5, 10, 15, 20]
    assert metrics[-1]["data_loss"] < metrics[0]["data_loss"]
    assert (folder / "schedule.png").exists()


POOL_AND_MOMENTS = ["--pool", 8, "--moments-weight", 1]


@pytest.fixture(scope="module")
def from_pool(tmp_path_factory):
    """The same run on batches drawn by importance, with moments in the objective."""
    results = tmp_path_factory.mktemp("pooled")
    run(*TRAIN, "--results-dir", results, "--max-steps", STEPS, "--ckpt-every", EVERY, *POOL_AND_MOMENTS)
    return results


@pytest.mark.parametrize(("stop", "pool"), [(7, []), (14, []), (19, []), (14, POOL_AND_MOMENTS)])
def test_killed_and_resumed_ends_bit_for_bit_the_same(
    uninterrupted, from_pool, tmp_path, monkeypatch, stop, pool
):
    """Ended within the growing of a candidate, within the exchanges, among the updates."""
    arguments = [*TRAIN, "--results-dir", tmp_path, "--max-steps", STEPS, "--ckpt-every", EVERY, *pool]
    uninterrupted = from_pool if pool else uninterrupted
    done = iter(range(stop))
    with monkeypatch.context() as patch:
        original = Run.step_done

        def step_or_die(self, update):
            if next(done, None) is None:
                raise KeyboardInterrupt
            original(self, update)

        patch.setattr(Run, "step_done", step_or_die)
        run(*arguments, status=130)
    run(*arguments, "--resume", "auto")
    whole, resumed = router_in(uninterrupted), max(tmp_path.glob("0*"))
    resumed = load_router(find_router(resumed))
    assert torch.equal(whole.logits, resumed.logits)
    assert torch.equal(whole.weights, resumed.weights)


def test_moments_are_trained_on(from_pool, tmp_path):
    """They move the weights, and the logged loss is that of both; the data loss is the MSE alone."""
    without = POOL_AND_MOMENTS[:2]
    run(*TRAIN, "--results-dir", tmp_path, "--max-steps", STEPS, "--ckpt-every", EVERY, *without)
    assert torch.equal(router_in(from_pool).logits, router_in(tmp_path).logits)
    assert not torch.equal(router_in(from_pool).weights, router_in(tmp_path).weights)
    last = []
    for folder in (from_pool, tmp_path):
        lines = next(folder.glob("0*/metrics.jsonl")).read_text().splitlines()
        last.append(json.loads(lines[-1]))
    # A line is a mean over five train steps, of logarithms; two of them are of the search.
    gap = [row["loss"] - math.log(row["data_loss"]) for row in last]
    assert gap[0] > gap[1] + 0.1


@pytest.mark.slow
def test_a_state_of_other_candidates_is_refused():
    def training(num_tables):
        return EndToEndTraining(num_tables, (4, 24), 3, 0.1, None, torch.device("cpu"))

    with pytest.raises(
        ValueError,
        match=r"'tables' of the checkpoint has the shape \(2, 4, 24\), this training's \(3, 4, 24\)",
    ):
        training(3).state.load(training(2).state.tensors())


@pytest.mark.parametrize("pool", [[], POOL_AND_MOMENTS])
def test_two_processes_train_the_same_router(uninterrupted, from_pool, tmp_path, pool):
    arguments = ["--results-dir", tmp_path, "--max-steps", STEPS, "--ckpt-every", EVERY, *pool]
    torchrun(2, *TRAIN, *arguments)
    uninterrupted = from_pool if pool else uninterrupted
    one, two = router_in(uninterrupted), router_in(tmp_path)
    assert torch.equal(one.logits, two.logits)
    # Stored outputs are nearly collinear: rounding moves weights, but hardly what they make.
    model, chain, labels = load_model("DiT-digits/2"), create_diffusion("4"), torch.arange(20) % 10
    schedules = (None, one.schedule(0.1), two.schedule(0.1))
    plain, of_one, of_two = (
        generate_seeded(Trajectory(model, chain, schedule=one), labels, 7) for one in schedules
    )
    assert (of_one - of_two).square().mean() < 1e-2 * (of_one - plain).square().mean()


@pytest.mark.parametrize("terms", [0, 1])
def test_fewer_terms(tmp_path, terms):
    run(*TRAIN, "--results-dir", tmp_path, "--max-steps", 18, "--terms", terms)
    router = router_in(tmp_path)
    assert router.info["method"] == ("end-to-end+forecast" if terms else "end-to-end")
    assert (router.weights is None) == (terms == 0)
    if terms:
        assert router.weights.shape == (4, 24, 1)


@pytest.mark.parametrize(("kind", "value", "num_steps"), [("speedup", 3, 8), ("cur", 0.4, 4)])
def test_the_target_is_met(tmp_path, kind, value, num_steps):
    arguments = [argument for argument in TRAIN if argument not in ("--target-speedup", 1.7)]
    arguments[arguments.index("--num-sampling-steps") + 1] = num_steps
    text = run(*arguments, "--results-dir", tmp_path, f"--target-{kind}", value, "--max-steps", 17)
    assert "the target was not met" not in text
    schedule = router_in(tmp_path).schedule(0.1)
    if kind == "cur":
        assert schedule.cur == pytest.approx(value, abs=1 / 96)
    else:
        assert value <= schedule.speedup_macs(load_model("DiT-digits/2")) < 1.01 * value


def test_a_schedule_of_other_steps_as_a_start(uninterrupted, tmp_path):
    source = find_router(next(uninterrupted.glob("0*")))
    arguments = [*TRAIN, "--results-dir", tmp_path]
    arguments[arguments.index("--num-sampling-steps") + 1] = 8
    run(*arguments, "--init", source, "--max-steps", 10, "--target-speedup", 2)
    router = router_in(tmp_path)
    assert router.logits.shape == (8, 24)
    assert 2 <= router.schedule(0.1).speedup_macs(load_model("DiT-digits/2")) < 2.05


def test_options_for_scale_train(tmp_path):
    options = [
        "--pool",
        4,
        "--moments-weight",
        1,
        "--window",
        2,
        "--open-share",
        0.5,
        "--keep-activations",
        "--precision",
        "bf16",
    ]
    run(*TRAIN, *options, "--results-dir", tmp_path, "--max-steps", 19)
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


def test_broken_weights_are_one_line(tmp_path):
    state = load_file(ROOT / "examples" / "digits" / "dit.safetensors")
    state["blocks.3.mlp.fc1.weight"][0] = 3e38  # finite, or the checkpoint would be refused
    save_file(state, tmp_path / "broken.safetensors")
    line = error_line(*TRAIN, "--results-dir", tmp_path / "r", "--ckpt", tmp_path / "broken.safetensors")
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
    with_l2c = ["train_router.py", "--method", "harmonica", "--terms", 2, "--target-cur", 7]
    text = run(*with_l2c, "--model", "DiT-digits/2", "--results-dir", tmp_path, status=2)
    assert re.search("--target-cur 7 is outside", text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("sampler", "cfg_scale", "share"), [("ddim", 1.5, 0.6), ("ddpm", 1.0, 0.9)])
def test_calibration_gives_a_static_schedule_its_weights(sampler, cfg_scale, share):
    model, diffusion, schedule = load_model("DiT-digits/2"), create_diffusion("10"), fora_schedule(10, 24, 2)
    options = {"cfg_scale": cfg_scale, "sampler": sampler}
    labels = torch.arange(20) % 10
    plain = generate_seeded(Trajectory.of(model, diffusion, **options), labels, 7)

    def error(schedule) -> float:
        trajectory = Trajectory.of(model, diffusion, schedule=schedule, **options)
        x_0 = generate_seeded(trajectory, labels, 7)
        return (x_0 - plain).square().mean().item()

    solved = calibrated(Trajectory.of(model, diffusion, schedule=schedule, **options), 3, 32)
    assert torch.equal(solved.compute, schedule.compute)
    assert error(solved) < share * error(schedule)


def test_router_with_weights_keeps_to_its_format(uninterrupted, tmp_path):
    router = router_in(uninterrupted)
    save_router(tmp_path / "again.safetensors", router)
    again = load_router(tmp_path / "again.safetensors")
    assert torch.equal(again.weights, router.weights)
    with pytest.raises(ValueError, match="the released layout has no place for weights"):
        save_router(tmp_path / "released.pt", router)
    assert not (tmp_path / "released.pt").exists()
    line = error_line("router.py", tmp_path / "again.safetensors", "--export", tmp_path / "x.pt")
    assert "no place for weights" in line
