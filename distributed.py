"""Processes: `torchrun` adds ranks, plain `python` is one process without a process group.

NCCL where every process has a GPU of its own, gloo on CPUs. All reductions are means over ranks.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from cli import choose_device


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
    """Join the processes that torchrun started, or be the only one. Raises ValueError for too few GPUs.

    patience: how long one rank may wait for another; None is torch's own, minutes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or "RANK" not in os.environ:  # a scheduler's WORLD_SIZE alone makes no process group
        return Processes(0, 1, choose_device(device))
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {device} under torchrun: every process takes its own GPU; leave it out")
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        local_world_size, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if local_world_size > gpus:
            raise ValueError(
                f"{local_world_size} processes on a machine of {gpus} GPUs; lower --nproc_per_node to {gpus} "
                "or add --device cpu"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", timeout=patience, device_id=chosen)
    else:
        chosen = choose_device(device or "cpu")
        dist.init_process_group("gloo", timeout=patience)
    return Processes(rank, world_size, chosen)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def from_main(value):
    """Rank 0's value of a small picklable object, on every rank."""
    if dist.is_initialized():
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]
    return value


def any_rank(condition: bool) -> bool:
    """Whether a condition holds on any rank."""
    if not dist.is_initialized():
        return condition
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, condition)
    return any(answers)


def mean(tensor: Tensor) -> Tensor:
    """The mean over ranks, in place. gloo has no averaging reduction, so the sum is divided."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def gathered(tensor: Tensor) -> Tensor:
    """(n, ...) of every rank, of one shape on all, joined in the order of the ranks."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
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
