"""No process outlives what started it under torchrun, and every other does as ever."""

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT, alive, kill, start, wait_for

from common import cli, files, lifeline

PYTHON = sys.executable
CHILD = "import time; from common import lifeline; open('{ready}', 'w').close(); time.sleep(60)"
# What stands for torchrun: it starts a child and waits.
PARENT = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
UNDER_TORCHRUN = {lifeline.RUN_ID: "the run", "LOCAL_RANK": "0"}


@pytest.fixture(params=["kernel", "thread"])
def child(request, tmp_path):
    """A child's command line, which makes a file when it is bound: by the kernel, or by a thread alone."""
    code = CHILD.format(ready=tmp_path / "ready")
    if request.param == "thread":
        code = "import ctypes; ctypes.CDLL = lambda _: None; " + code
    return [PYTHON, "-c", code]


def test_killing_torchrun_ends_its_processes(child, tmp_path):
    parent = start([PYTHON, "-c", PARENT, *child], **UNDER_TORCHRUN)
    wait_for((tmp_path / "ready").exists, parent)
    assert len(alive(parent)) == 2
    assert kill(parent) == []


def test_through_a_script(child, tmp_path):
    """torchrun --no-python: the process's parent is a shell, which nobody kills."""
    script = tmp_path / "wrapper.sh"
    script.write_text('#!/bin/sh\n"$@"\necho ended\n')
    script.chmod(0o755)
    parent = start([PYTHON, "-c", PARENT, script, *child], **UNDER_TORCHRUN)
    wait_for((tmp_path / "ready").exists, parent)
    assert len(alive(parent)) == 3
    assert kill(parent) == []


def test_a_process_without_torchrun_outlives_its_shell(child, tmp_path):
    """`nohup python train_router.py &`"""
    parent = start([PYTHON, "-c", PARENT, *child])
    wait_for((tmp_path / "ready").exists, parent)
    assert len(kill(parent)) == 1


def test_torchrun_that_is_gone_before_the_first_line(tmp_path):
    late = f"import time; time.sleep(1); {CHILD.format(ready=tmp_path / 'ready')}"
    parent = start([PYTHON, "-c", PARENT, PYTHON, "-c", late], **UNDER_TORCHRUN)
    wait_for(lambda: len(alive(parent)) == 2, parent)
    assert kill(parent) == []
    assert not (tmp_path / "ready").exists()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing(tmp_path, method):
    (tmp_path / "work.py").write_text(
        "import multiprocessing, time\nfrom common import lifeline\n"
        "def work(name):\n"
        "    lifeline.follow_starter()\n"
        "    open(name, 'w').close()\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        f"    context = multiprocessing.get_context('{method}')\n"
        f"    for k in '12': context.Process(target=work, args=('{tmp_path}/' + k,)).start()\n"
    )
    parent = start([PYTHON, tmp_path / "work.py"], PYTHONPATH=str(ROOT))
    wait_for(lambda: (tmp_path / "1").exists() and (tmp_path / "2").exists(), parent)
    assert kill(parent) == []


def test_bound_command_ends_with_who_started_it(tmp_path):
    code = f"open('{tmp_path / 'ready'}', 'w').close(); import time; time.sleep(60)"
    starter = "import subprocess; from common import lifeline; "
    starter += f"subprocess.run(lifeline.bound({[PYTHON, '-c', code]!r}))"
    parent = start([PYTHON, "-c", starter])
    wait_for((tmp_path / "ready").exists, parent)
    assert kill(parent) == []


def test_bound_command_is_the_command():
    done = subprocess.run(lifeline.bound(["sh", "-c", "echo $0 $1; exit 3", "a", "b c"]), capture_output=True)
    assert (done.returncode, done.stdout) == (3, b"a b c\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_and_ctrl_c_remove_what_is_half_written(tmp_path, number, status):
    """A command that is writing a file for ever, in a fork of this process."""
    folder, printed = tmp_path / "folder", tmp_path / "printed"
    folder.mkdir()

    def main(_) -> None:
        with files.replacing(folder / "x.npz") as temporary:
            temporary.write_bytes(b"half")
            time.sleep(60)

    def write() -> None:
        # A job in the background of a shell is started with SIGINT ignored, and hands that on.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with printed.open("w") as sys.stderr:
            cli.run(main, argparse.Namespace())

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    wait_for(lambda: list(folder.glob("*.part.npz")))
    time.sleep(0.1)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == status
    assert "Traceback" not in printed.read_text()
    assert not list(folder.iterdir())
