"""How runs are timed: in which order, what counts, which ratio is taken."""

import subprocess
import sys

import pytest
import torch
from commands import ROOT

from common import timing
from common.timing import alternating, latency, paired_ratio

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what the runs themselves add."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def run(name: str, seconds: list[float], calls: list[str]):
        remaining = iter(seconds)

        def function() -> None:
            calls.append(name)
            now[0] += next(remaining)

        return function

    return run


def test_functions_alternate_and_the_warm_up_does_not_count(clock):
    calls: list[str] = []
    runs = [clock("A", [9.0, 1.0, 2.0], calls), clock("B", [8.0, 3.0, 5.0], calls)]
    assert alternating(runs, 2, CPU) == [[1.0, 2.0], [3.0, 5.0]]
    assert "".join(calls) == "ABABAB"
    calls.clear()
    assert alternating([clock("A", [4.0], calls)], 1, CPU, warm_up=0) == [[4.0]]
    assert calls == ["A"]


def test_the_speed_up_is_the_median_ratio_of_neighbours():
    plain, own = [2.0, 20.0, 6.0], [1.0, 5.0, 2.0]  # the machine was slow in the second pair
    assert paired_ratio(plain, own) == 3.0
    row = latency(own, plain)
    assert row == {"ms": 2000.0, "ms_least": 1000.0, "ms_most": 5000.0, "speedup_latency": 3.0}


def test_ceilings_are_those_of_the_best_run(monkeypatch):
    monkeypatch.setattr(timing, "COPY_BYTES", 2**12)
    monkeypatch.setattr(timing, "alternating", lambda *_, **__: [[0.5, 0.25, 1.0]])
    assert timing.copy_ceiling(CPU) == 2 * 2**12 / 0.25
    rows, width = 2**10, 2**8  # 268 million products: 8 of them take the 2e9 that one run should have
    assert timing.matmul_ceiling(CPU, torch.float32, rows, width) == 8 * rows * 4 * width**2 / 0.25


@pytest.mark.slow
def test_the_peak_begins_anew():
    """In a process of its own: one that has freed much memory takes none for a new tensor."""
    code = """
import torch
from common.timing import peak_memory, reset_peak_memory
held = torch.ones(2**26)  # 256 MiB
first, size = peak_memory(), held.nbytes
del held
reset_peak_memory()
after = peak_memory()
held = torch.ones(2**26)
print(first - after, peak_memory() - after, size)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    fallen, risen, size = map(int, done.stdout.split())
    assert fallen >= 0.9 * size
    assert risen >= 0.9 * size
