"""Processes: where the environment puts one, how they meet and end, and that nobody is left of a kill."""

import socket

import pytest
import torch
from commands import ROOT, alive, error_line, kill, start_torchrun, torchrun, wait_for
from ranks import run_on_ranks

from common import distributed
from common.distributed import Place, place_in_environment

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Sets these variables and no others of torchrun's; None: not set."""

    def put(values: dict) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            if value is not None:
                monkeypatch.setenv(name, value)

    return put


def test_what_torchrun_says(environment):
    environment(TORCHRUN)
    assert place_in_environment() == Place(3, 4, 1, 2)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"WORLD_SIZE": "8"},  # a scheduler's
        {"WORLD_SIZE": "8", "LOCAL_RANK": "3"},
        {"RANK": "3"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"RANK": " ", "WORLD_SIZE": "8"},
        {"RANK": "0", "WORLD_SIZE": "1"},  # without the rest
        TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_a_single_process(environment, values):
    environment(values)
    processes = distributed.start("cpu")
    assert (processes.rank, processes.world_size) == (0, 1)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"LOCAL_RANK": None},
            "RANK and WORLD_SIZE are set, but LOCAL_RANK is not; start the processes with",
        ),
        ({"LOCAL_RANK": ""}, "but LOCAL_RANK is not"),
        ({"MASTER_ADDR": None}, "but MASTER_ADDR is not"),
        ({"MASTER_PORT": None}, "but MASTER_PORT is not"),
        ({"RANK": "4"}, "RANK 4 is not below WORLD_SIZE 4"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK 1 is not below WORLD_SIZE 1"),
        ({"RANK": "-1"}, "RANK is '-1', no number from 0 on"),
        ({"RANK": "first"}, "RANK is 'first', no number"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four', no number from 1 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', no number from 1 on"),
        ({"WORLD_SIZE": "4.0"}, "WORLD_SIZE is '4.0', no number"),
        ({"LOCAL_RANK": "a"}, "LOCAL_RANK is 'a', no number"),
        ({"LOCAL_WORLD_SIZE": "a"}, "LOCAL_WORLD_SIZE is 'a', no number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', no number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT 99999 is no port"),
    ],
)
@pytest.mark.parametrize("script", ["train_router.py", "sample_ddp.py"])
def test_variables_that_do_not_fit_are_one_line(environment, tmp_path, script, values, words):
    environment(TORCHRUN | values)
    where = ["--results-dir", tmp_path] if script == "train_router.py" else ["--output", tmp_path / "x.npz"]
    line = error_line(script, "--model", "DiT-digits/2", "--device", "cpu", *where)
    assert words in line
    assert "torchrun" in line or "port" in line
    assert not list(tmp_path.iterdir())


def test_a_port_in_use_is_one_line(environment):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        environment(TORCHRUN | {"RANK": "0", "MASTER_PORT": port})
        with pytest.raises(OSError, match=f"cannot meet at 127.0.0.1:{port} .*another --master_port") as one:
            distributed.start("cpu")
    assert "--standalone" in str(one.value)
    assert "\n" not in str(one.value)


def test_a_first_process_that_never_comes_is_one_line(environment, monkeypatch):
    monkeypatch.setattr(
        "common.distributed.MEETING", torch.distributed.default_pg_timeout.__class__(seconds=1)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment(TORCHRUN | {"MASTER_PORT": port})
    with pytest.raises(OSError, match=f"cannot meet at 127.0.0.1:{port}"):
        distributed.start("cpu")


RANKS = """
import argparse, sys
sys.path.insert(0, {root!r})
from common import cli, distributed
def main(_):
    processes = distributed.start("cpu")
    def work():
        if processes.rank == 1:
            raise {error}("what rank 1 alone has met")
    {call}
cli.run(main, argparse.Namespace())
"""


@pytest.mark.slow
def test_an_error_of_one_rank_is_told_once_and_ends_all(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(ROOT), error="ValueError", call="distributed.together(work)"))
    text = torchrun(2, script, status=1)
    assert text.count("error: what rank 1 alone has met") == 1
    assert text.count("Traceback") == 1  # torchrun's own


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_an_error_of_one_rank_ends_all_ranks_with_status_2(monkeypatch, tmp_path, error):
    def main(_) -> None:
        processes = distributed.start("cpu")

        def work() -> None:
            if processes.rank == 1:
                raise error("what rank 1 alone has met")

        distributed.together(work)

    monkeypatch.setattr("train_router.main", main)
    text = run_on_ranks(2, "train_router.py", "--results-dir", tmp_path, status=2)
    assert text == "train_router.py: error: what rank 1 alone has met\n"


@pytest.mark.slow
def test_a_rank_that_is_gone_ends_the_others_in_one_line(tmp_path):
    """Rank 1 ends on its own; rank 0 waits for it in an exchange."""
    script = tmp_path / "ranks.py"
    call = "distributed.from_main(0); work(); distributed.from_main(1); distributed.from_main(2)"
    script.write_text(RANKS.format(root=str(ROOT), error="SystemExit", call=call))
    text = torchrun(2, script, status=1)
    lines = [line for line in text.splitlines() if "error: another process has ended" in line]
    assert len(lines) <= 1  # torchrun may have ended it first
    assert "RuntimeError" not in text


# ---- kill -9 of torchrun ---------------------------------------------------------------------------

TRAIN = ["train_router.py", "--model", "DiT-digits/2", "--num-sampling-steps", 5, "--global-batch-size", 4]
TRAIN += ["--max-steps", 100_000, "--ckpt-every", 5, "--device", "cpu"]
WORKERS = ["--method", "l2c", "--data", "digits", "--num-works", 2]
SAMPLE = ["sample_ddp.py", "--model", "DiT-digits/2", "--num-sampling-steps", 50, "--batch-size", 16]
SAMPLE += ["--num-samples", 50_000, "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "least", "made"),
    [
        ([*TRAIN, "--results-dir"], 3, None),
        ([*SAMPLE, "--sample-dir"], 3, None),
        ([*TRAIN, "--results-dir"], 3, "*/checkpoints/*.safetensors"),
        ([*TRAIN, *WORKERS, "--results-dir"], 7, "*/checkpoints/*.safetensors"),
        ([*SAMPLE, "--sample-dir"], 3, "*.parts/*.npy"),
    ],
    ids=["train-starts", "sample-starts", "train", "train-with-workers", "sample"],
)
def test_nobody_is_left_of_a_killed_torchrun(tmp_path, arguments, least, made):
    """Two seconds after it; at start-up, as soon as it has started its processes."""
    process = start_torchrun(2, *arguments, tmp_path)
    wait_for(lambda: len(alive(process)) >= least and (not made or list(tmp_path.glob(made))), process)
    assert kill(process) == []
