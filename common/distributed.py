"""Processes: `torchrun` adds ranks, plain `python` is one process without a process group.

NCCL where every process has a GPU of its own, gloo on CPUs. All reductions are means over ranks. Where one
process ends, the others end too.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from common.devices import choose_device

MEETING = timedelta(minutes=10)  # how long the first process may wait for the last one to start


@dataclass(frozen=True)
class Processes:
    """This process among all: `rank` 0 logs and writes, `device` is its own."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str | None = None, patience: timedelta | None = None) -> Processes:
    """Join the processes that torchrun started, or be the only one.

    patience: how long one rank may wait for another; None is torch's own, minutes. Raises ValueError for too
    few GPUs and for variables that do not fit, OSError where the processes cannot meet.
    """
    place = place_in_environment()
    if place is None:
        return Processes(0, 1, choose_device(device))
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {device} under torchrun: every process takes its own GPU; leave it out")
    if torch.cuda.is_available() and device != "cpu":
        needed, gpus = max(place.local_world_size, place.local_rank + 1), torch.cuda.device_count()
        if needed > gpus:
            raise ValueError(
                f"{needed} processes on a machine of {gpus} GPUs; lower --nproc_per_node to {gpus} "
                "or add --device cpu"
            )
        chosen = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(chosen)
        _meet("nccl", patience, device_id=chosen)
    else:
        chosen = choose_device(device or "cpu")
        _meet("gloo", patience)
    return Processes(place.rank, place.world_size, chosen)


@dataclass(frozen=True)
class Place:
    """Where torchrun put this process among all, and among those of its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def place_in_environment() -> Place | None:
    """This process's place by RANK, WORLD_SIZE and the like; None for the only process.

    A scheduler's RANK or WORLD_SIZE alone, or an empty one, makes no process group. Raises ValueError, naming
    the variable, where they ask for one and do not fit together.
    """
    if not _variable("RANK") or not _variable("WORLD_SIZE"):
        return None
    rank, world_size = _number("RANK"), _number("WORLD_SIZE", least=1)
    if rank >= world_size:
        raise ValueError(f"RANK {rank} is not below WORLD_SIZE {world_size}; {_REMEDY}")
    if world_size == 1:
        return None
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not _variable(name):
            raise ValueError(f"RANK and WORLD_SIZE are set, but {name} is not; {_REMEDY}")
    if not _number("MASTER_PORT", least=1) < 2**16:
        raise ValueError(f"MASTER_PORT {_variable('MASTER_PORT')} is no port; take one below 65536")
    local_world_size = _number("LOCAL_WORLD_SIZE", least=1) if _variable("LOCAL_WORLD_SIZE") else 1
    return Place(rank, world_size, _number("LOCAL_RANK"), local_world_size)


_REMEDY = "start the processes with torchrun, or unset RANK and WORLD_SIZE for a single one"


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip()


def _number(name: str, least: int = 0) -> int:
    text = _variable(name)
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} is {text!r}, no number from {least} on; {_REMEDY}")
    return int(text)


def _meet(backend: str, patience: timedelta | None, **options) -> None:
    """Make the process group. Raises OSError in one line where the processes do not find each other."""
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=MEETING))
        store.set_timeout(MEETING)
        options |= {"store": dist.PrefixStore("harmonica", store), "rank": rank, "world_size": world_size}
        dist.init_process_group(backend, timeout=patience, **options)
    except (RuntimeError, ValueError) as error:
        where = f"{_variable('MASTER_ADDR')}:{_variable('MASTER_PORT')}"
        reason = str(error).strip().partition("\n")[0]
        raise OSError(
            f"the processes cannot meet at {where} ({reason}); take another --master_port, or "
            "--standalone on a single machine"
        ) from error


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class PeerLost(ValueError):
    """Another process has ended; it says why."""


@contextlib.contextmanager
def _exchanging() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's ways of saying that nobody answers
        reason = str(error).strip().partition("\n")[0]
        raise PeerLost(
            f"another process has ended or does not answer, so this one ends ({reason})"
        ) from error


def together(function: Callable):
    """Call a function on every rank; where it fails on one (ValueError, OSError), all end.

    Returns its own result; raises the error on the first rank that has one and ends the others in silence.
    """
    result = error = None
    try:
        result = function()
    except (ValueError, OSError) as caught:
        error = caught
    failed = _gathered(error is not None)
    if not any(failed):
        return result
    if error is None or (dist.is_initialized() and failed.index(True) != dist.get_rank()):
        raise SystemExit(2)
    error.of_one_rank = True  # so that it is told whichever rank this is
    raise error


def main_first(function: Callable):
    """What `function` returns, called on rank 0 first: the others find what it leaves on disk.

    Where it fails on rank 0, all ranks raise.
    """
    if not dist.is_initialized():
        return function()
    is_main = dist.get_rank() == 0
    result = together(lambda: function() if is_main else None)
    return result if is_main else function()


def from_main(value):
    """Rank 0's value of a small picklable object, on every rank."""
    if dist.is_initialized():
        box = [value]
        with _exchanging():
            dist.broadcast_object_list(box)
        return box[0]
    return value


def _gathered(value) -> list:
    """A small picklable object of every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    with _exchanging():
        dist.all_gather_object(values, value)
    return values


def mean(tensor: Tensor) -> Tensor:
    """The mean over ranks, in place. gloo has no averaging reduction, so the sum is divided."""
    summed(tensor)
    if dist.is_initialized():
        tensor /= dist.get_world_size()
    return tensor


def summed(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if dist.is_initialized():
        with _exchanging():
            dist.all_reduce(tensor)
    return tensor


def gathered(tensor: Tensor) -> Tensor:
    """The tensors (n, ...) of all ranks, joined in the order of the ranks. All have the same shape."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    with _exchanging():
        dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """From now on, average over ranks the gradients that are there before every `optimizer.step()`.

    In router training that is one row of B numbers a step: nothing else is exchanged.
    """

    def exchange(optimizer: torch.optim.Optimizer, *_) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean(parameter.grad)

    optimizer.register_step_pre_hook(exchange)
