"""Two ranks in forked processes: what torchrun starts, without its seconds of imports."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from common.distributed import Processes


def on_two_ranks(function: Callable[[Processes], object], folder: Path) -> None:
    """Call a function on both ranks of a process group that meets in `folder`; it must return on both."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(function, folder / "meeting", rank)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    ended = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert ended == [0, 0], ended


def _rank(function: Callable[[Processes], object], meeting: Path, rank: int) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        function(Processes(rank, 2, torch.device("cpu")))
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
