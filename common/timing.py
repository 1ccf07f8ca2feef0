"""How long things take and what they need: timing in turn, the device's ceilings, peak memory."""

import contextlib
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

COPY_BYTES = 2**28  # far beyond any cache
CEILING_RUNS = 10


def timed(function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """The function's result and its wall-clock seconds, the device synchronised before and after."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    began = time.perf_counter()
    result = function()
    wait()
    return result, time.perf_counter() - began


def alternating(
    functions: Sequence[Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 1
) -> list[list[float]]:
    """Seconds of every repeat, one list per function: A B A B, so that a machine that slows down slows all.

    Warm-up runs come first and are not counted.
    """
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(-warm_up, repeats):
        for own, function in zip(times, functions, strict=True):
            elapsed = timed(function, device)[1]
            if repeat >= 0:
                own.append(elapsed)
    return times


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over repeats of the ratio of two neighbours in turn: what slows both down cancels."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def latency(own: Sequence[float], plain: Sequence[float]) -> dict[str, float]:
    """Of a row: median, least and most milliseconds, and the speed-up over `plain`, timed in turn with it."""
    columns = {"ms": 1000 * statistics.median(own), "ms_least": 1000 * min(own), "ms_most": 1000 * max(own)}
    return columns | {"speedup_latency": paired_ratio(plain, own)}


# ---- ceilings --------------------------------------------------------------------------------------


def captured(function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """What `function` runs on the GPU, to be replayed, and the tensor that each replay fills anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries and the compiler set themselves up outside of the capture
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph, output


def matmul_ceiling(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> float:
    """Multiply-accumulates per second of a linear layer, (rows, width) to (rows, 4 width): the best run's."""
    x = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(4 * width, width, device=device, dtype=dtype)
    least = 2e12 if device.type == "cuda" else 2e9  # milliseconds: beside it the host's part is little
    inner = max(1, math.ceil(least / (rows * width * 4 * width)))

    def run() -> Tensor:
        for _ in range(inner):
            output = F.linear(x, weight)
        return output

    if device.type == "cuda":  # small products take less time than the host takes to ask for them
        run = captured(run)[0].replay
    (times,) = alternating([run], CEILING_RUNS, device, warm_up=3)
    return inner * rows * width * 4 * width / min(times)


def copy_ceiling(device: torch.device) -> float:
    """Bytes per second read and written by a copy of a large tensor: the best run's."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    (times,) = alternating([lambda: target.copy_(source)], CEILING_RUNS, device, warm_up=3)
    return 2 * COPY_BYTES / min(times)


# ---- memory ----------------------------------------------------------------------------------------


def peak_memory(device: torch.device | str = "cpu") -> int:
    """The most bytes held since the process began or `reset_peak_memory`: of the GPU, or of RAM."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    import resource  # macOS; on Linux a new process would begin with its parent's figure

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak_memory(device: torch.device | str = "cpu") -> None:
    """Begin anew to look for the peak, where the system can; elsewhere it stays the process's."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
