"""Where and in which precision a command computes: devices, precisions, threads, the hardware's name."""

import argparse
import contextlib
import platform
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from common import cli

PRECISIONS = ("fp32", "tf32", "bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=PRECISIONS, help="default: tf32 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    # What `python -m torch.distributed.launch` and DeepSpeed's launcher add; torchrun says it in LOCAL_RANK.
    parser.add_argument("--local-rank", "--local_rank", type=cli.non_negative_int, help=argparse.SUPPRESS)


def set_precision(precision: str | None, device: torch.device) -> tuple[str, torch.dtype]:
    """Apply a precision to `device`; returns its name and the dtype of the model's weights.

    tf32: float32 weights, matrix products in TF32 (GPU only). bf16: bfloat16 weights; x_t and the sampler
    stay float32.
    """
    precision = precision or ("tf32" if device.type == "cuda" else "fp32")
    if precision == "tf32" and device.type != "cuda":
        warnings.warn("--precision tf32 has no effect on a CPU, fp32 is used", stacklevel=2)
        precision = "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision, torch.bfloat16 if precision == "bf16" else torch.float32


def hardware(device: torch.device) -> str:
    """What a figure was measured on: the GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        name = found[1]
    return f"{name}, {torch.get_num_threads()} threads"


def choose_device(name: str | None) -> torch.device:
    """The named device, or a GPU where there is one. Raises ValueError for a device that is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); use cpu or leave it out") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are made on the current one
    return device


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, compute in one thread: several threads split products and sums, and round otherwise.

    What must come out the same to the last bit on any number of cores and processes is computed under this.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
