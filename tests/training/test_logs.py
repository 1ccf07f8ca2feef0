"""A training's record: its losses, and what a full disk, a kill or a damaged line leaves of it."""

import json

import pytest
import torch
from commands import file_size_limit
from PIL import Image

from objectives import TrainStep
from training.logs import LossLog, RunLog


def update(loss: float, step=3) -> TrainStep:
    return TrainStep(step, torch.tensor(loss), torch.tensor(loss / 2), torch.tensor(8.0))


def test_losses_are_means_since_the_last_summary():
    losses = LossLog()
    losses.add(1, update(1.0))
    losses.add(2, update(2.0))
    assert len(losses) == 2
    losses.settle()
    assert len(losses) == 0
    losses.add(3, update(6.0))
    assert losses.summary() == {"loss": 3.0, "data_loss": 1.5, "score_sum": 8.0}
    assert losses.summary() == {}
    losses.add(4, update(5.0))
    assert losses.summary()["loss"] == 5.0


def test_losses_are_means_over_ranks(monkeypatch):
    """In one exchange of all that is pending."""
    exchanged = []

    def mean(rows: torch.Tensor) -> torch.Tensor:
        exchanged.append(rows.shape)
        return rows + 1

    monkeypatch.setattr("training.logs.distributed.mean", mean)
    losses = LossLog()
    for step in range(3):
        losses.add(step, update(1.0))
    assert losses.summary() == {"loss": 2.0, "data_loss": 1.5, "score_sum": 9.0}
    assert exchanged == [(3, 3)]


@pytest.mark.parametrize(("value", "step", "said"), [
    (float("nan"), 3, r"the loss is nan at train step 7 \(denoising step 3\)"),
    (float("inf"), (1, 4), r"the loss is inf at train step 7 \(denoising steps \(1, 4\)\)"),
])  # fmt: skip
def test_a_loss_that_is_not_finite_names_its_step(value, step, said):
    losses = LossLog()
    losses.add(6, update(1.0))
    losses.add(7, update(value, step))
    with pytest.raises(ValueError, match=said):
        losses.settle()


def test_lines_are_shown_and_kept(tmp_path):
    shown = []
    log = RunLog(tmp_path, show=shown.append)
    log.info("one")
    log.info("two")
    assert shown == ["one", "two"]
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n"


def test_lines_that_do_not_fit_are_not_begun(tmp_path):
    log = RunLog(tmp_path)
    log.info("first")
    log.metrics(5, {"loss": 1.0})
    before = [(tmp_path / name).read_bytes() for name in ("log.txt", "metrics.jsonl")]
    with file_size_limit(35):
        with pytest.raises(OSError, match=r"log\.txt cannot be written"):
            log.info("second, which is longer than what is left")
        with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written"):
            log.metrics(10, {"loss": 0.5, "data_loss": 0.25})
        with pytest.raises(OSError, match=r"schedule\.png cannot be written"):
            log.picture(10, "schedule", Image.new("RGB", (50, 50)))
    assert [(tmp_path / name).read_bytes() for name in ("log.txt", "metrics.jsonl")] == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "line", [b'{"train_steps": 15, "lo', b'{"loss": 1}', b"[15]", b"15", bytes(20), b"\xff\xfe", b""]
)
def test_lines_that_do_not_read_are_dropped_on_resuming(tmp_path, line):
    log = RunLog(tmp_path)
    for step in (5, 10):
        log.metrics(step, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(line)
    log.forget_after(10)
    log.metrics(15, {"loss": 1.0})
    log.forget_after(20)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train_steps"] for line in lines] == [5, 10, 15]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None)
    log.info("text")
    log.metrics(5, {"loss": 1.0})
    log.forget_after(0)
    log.close()
    assert not list(tmp_path.iterdir())
