"""Training to a CUR or a speed-up: what is aimed at, what is refused, and that it is reached."""

import shutil

import pytest
import torch
from commands import error_line, run
from ranks import run_on_ranks

from backbones.loading import build_model
from router import Router, load_router
from schedules.baselines import fora_schedule
from training.target import RegWeightControl, Target

TRAIN = ["train_router.py", "--model", "DiT-digits/2", "--num-sampling-steps", 5, "--global-batch-size", 2]
TRAIN += ["--lr", 0.2, "--lambda-c", 100, "--cfg-scale", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def digits():
    return build_model("DiT-digits/2")


def test_what_is_missing_is_a_share(digits):
    schedule = fora_schedule(10, 24, 2)  # CUR 0.5
    assert Target("cur", 0.6, digits, 10).missing(schedule) == pytest.approx(0.1)
    speedup = schedule.speedup_macs(digits)
    assert Target("speedup", speedup, digits, 10).missing(schedule) == pytest.approx(0, abs=1e-12)
    assert Target("cur", 0.509, digits, 10).met(schedule)
    assert not Target("cur", 0.511, digits, 10).met(schedule)


def test_beta_rises_while_too_little_is_coming_and_falls_after(digits):
    """The coming schedule counts: logits that Adam drives below the threshold are counted as reused."""
    router = Router.from_logits(torch.zeros(10, 24))
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.0)
    control = RegWeightControl(Target("cur", 0.5, digits, 10), 0.1, log_weight=0.0)
    control.update(router, optimizer, 1, 1000)
    risen = control.log_weight
    assert risen > 0  # nothing is reused and nothing moves
    for row in router.rows:
        row.grad = torch.ones(24)
    optimizer.step()  # every logit goes down, towards a CUR of 0.9
    assert router.schedule(0.1).cur == 0
    control.update(router, optimizer, 1, 1000)
    assert control.log_weight < risen


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target-cur", 0.9], "--target-cur 0.9 is outside 0 .. 0.8, what 5 steps allow"),
        (["--target-cur", 0], "--target-cur 0 is outside 0 .. 0.8"),
        (["--target-speedup", 6], "--target-speedup 6 is outside 1 .. 4.43, what 5 steps allow"),
        (["--target-speedup", 0.9], "--target-speedup 0.9 is outside 1 .."),
        (["--target-cur", 0.3, "--ste-threshold", 0.001], "--ste-threshold 0.001 reuses nothing"),
        (
            ["--target-cur", 0.5, "--method", "l2c", "--data", "digits"],
            "0 .. 0.4, what 5 steps allow at even",
        ),
    ],
)
def test_out_of_reach_is_one_line(tmp_path, flags, message):
    assert message in error_line(*TRAIN, *flags, "--results-dir", tmp_path)
    assert not list(tmp_path.iterdir())


def test_targets_exclude_each_other_and_need_a_weight():
    assert "not allowed with" in run(*TRAIN, "--target-cur", 0.5, "--target-speedup", 2, status=2)
    assert "--l1 0 cannot be adjusted" in run(*TRAIN, "--target-cur", 0.5, "--l1", 0, status=2)


@pytest.mark.slow
def test_two_processes_meet_the_same_target(tmp_path):
    """Beta and the end of the run are one decision; the routers agree as without a target."""
    arguments = [*TRAIN, "--target-cur", 0.3, "--max-steps", 40]
    run(*arguments, "--results-dir", tmp_path / "one")
    run_on_ranks(2, *arguments, "--results-dir", tmp_path / "two")
    one, two = (load_router(next((tmp_path / name).iterdir())) for name in ("one", "two"))
    assert one.info["train_steps"] == two.info["train_steps"]
    torch.testing.assert_close(one.logits, two.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "value"), [("--target-speedup", 1.7)])
def test_target_is_reached_and_stored(tmp_path, digits, flag, value):
    text = run(*TRAIN, flag, value, "--results-dir", tmp_path, "--max-steps", 500, "--l1", 1e-5)
    assert "the target was not met" not in text
    (folder,) = tmp_path.iterdir()
    router = load_router(folder)
    schedule = router.schedule(router.info["threshold"])
    assert router.info["cur"] == pytest.approx(schedule.cur, abs=1e-5)
    assert router.info["speedup_macs"] == pytest.approx(schedule.speedup_macs(digits), abs=1e-5)
    assert router.info["reg_weight"] != 1e-5
    saved = schedule.cur if flag == "--target-cur" else 1 - 1 / schedule.speedup_macs(digits)
    assert saved == pytest.approx(value if flag == "--target-cur" else 1 - 1 / value, abs=0.01)


@pytest.mark.parametrize(("every", "kept"), [(7, 14), (5, 10)])  # inside a round, and between two
def test_resumed_run_has_the_same_beta(tmp_path, every, kept):
    """Killed after a checkpoint: logits and beta come out bit for bit."""
    arguments = [*TRAIN, "--target-cur", 0.4, "--ckpt-every", every, "--max-steps", 20]
    run(*arguments, "--results-dir", tmp_path / "once")
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    checkpoints = next((tmp_path / "twice").iterdir()) / "checkpoints"
    for path in checkpoints.iterdir():
        if int(path.stem) > kept:
            path.unlink()
    run(*arguments, "--results-dir", tmp_path / "twice", "--resume", "auto")
    once, twice = (load_router(next((tmp_path / name).iterdir())) for name in ("once", "twice"))
    assert once.info["train_steps"] == twice.info["train_steps"] > kept
    assert torch.equal(once.logits, twice.logits)
    assert once.info["reg_weight"] == twice.info["reg_weight"]
