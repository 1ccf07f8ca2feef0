"""A training's record: what a full disk, a kill or a damaged line leaves of it."""

import json

import pytest
from commands import file_size_limit
from PIL import Image

from training.logs import RunLog


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
