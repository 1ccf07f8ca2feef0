"""Ranks in forked processes: what torchrun starts, without its seconds of imports."""

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from commands import run

from common.distributed import Processes
from common.lifeline import RUN_ID


def on_two_ranks(function: Callable[[Processes], object], folder: Path) -> None:
    """Call a function on both ranks of a process group that meets in `folder`; it must return on both."""

    def on_rank(rank: int) -> None:
        meeting = f"file://{folder / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        function(Processes(rank, 2, torch.device("cpu")))
        dist.destroy_process_group()

    _forked(2, on_rank)


def run_on_ranks(processes: int, script: str, *arguments, status: int = 0) -> str:
    """What `torchrun --nproc_per_node=PROCESSES SCRIPT ARGUMENTS` prints; all ranks must end with `status`.

    The ranks find their place in the variables that torchrun sets, and meet as under torchrun.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": port, RUN_ID: "forked"}
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder) / str(rank) for rank in range(processes)]

        def on_rank(rank: int) -> None:
            own = place | {"RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in own.items()})
            printed[rank].write_text(run(script, *arguments, status=status))

        _forked(processes, on_rank)
        return "".join(path.read_text() for path in printed)


def _forked(number: int, function: Callable[[int], object]) -> None:
    """Call a function on ranks 0 .. number - 1, each in a fork of this process; it must return on all."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(function, rank)) for rank in range(number)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    ended = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert ended == [0] * number, ended


def _rank(function: Callable[[int], object], rank: int) -> None:
    try:
        function(rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
