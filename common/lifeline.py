"""A process that ends when its parent ends: after `kill -9` of torchrun no process trains on.

Commands that torchrun starts import this first, before modules that take seconds to import. It binds a
process to torchrun only; `nohup python ... &` outlives its shell as usual. It needs only the standard
library.

    python common/lifeline.py PID COMMAND ...   # runs COMMAND, which ends when process PID ends (see `bound`)

On Linux the kernel sends SIGKILL as soon as the parent is gone (PR_SET_PDEATHSIG); elsewhere a thread looks.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1  # from sys/prctl.h
LOOK_EVERY_S = 0.3
RUN_ID = "TORCHELASTIC_RUN_ID"  # torchrun gives it to every process that it starts


def end() -> None:
    """End at once, so that no half-written file takes the place of a whole one."""
    os.kill(os.getpid(), signal.SIGKILL)


def follow_parent(parent: int, stop: Callable[[], None] = end) -> None:
    """Call `stop` when this process's parent ends; at once where it has ended already."""
    if stop is not end or not _told_by_the_kernel():
        _watch(lambda: os.getppid() == parent, stop)
    if os.getppid() != parent:  # it ended before the kernel was asked
        stop()


def follow_starter() -> None:
    """End with the starter, in a child of `multiprocessing`, whose parent may be a server that lives on."""
    import multiprocessing

    starter = multiprocessing.parent_process()
    if starter.pid == os.getppid():
        follow_parent(starter.pid)
    if starter.pid != os.getppid():
        _watch(starter.is_alive, end)


def follow_torchrun() -> None:
    """Bind this process to the torchrun that started it, also through a script (`--no-python wrapper.sh`)."""
    if RUN_ID not in os.environ:
        return
    kernel = _told_by_the_kernel()
    parent = os.getppid()
    if _has_adopted(parent):  # torchrun was killed before this line
        end()
    if not kernel:
        _watch(lambda: os.getppid() == parent, end)
    if script := _scripts_between(parent):
        above = _parent_of(script)
        _watch(lambda: _parent_of(script) == above, end)


def bound(command: list[str]) -> list[str]:
    """A command line that runs `command` and ends when this process ends, in whatever way."""
    return [sys.executable, __file__, str(os.getpid()), *command]


def _told_by_the_kernel() -> bool:
    """Ask Linux for SIGKILL at the parent's end; False on other systems."""
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    return False


def _watch(alive: Callable[[], bool], stop: Callable[[], None]) -> None:
    def look() -> None:
        while alive():
            time.sleep(LOOK_EVERY_S)
        stop()

    threading.Thread(target=look, daemon=True).start()


def _has_adopted(parent: int) -> bool:
    """Whether `parent` did not start this process but took it over: no torchrun, nor a script of one.

    Process 1 takes orphans over, or another that asked for them; in a container process 1 may be torchrun.
    """
    if parent == 0:  # outside of this container
        return False
    try:
        libraries = Path(f"/proc/{parent}/maps").read_text(errors="replace")
    except OSError:  # another user's, or no Linux
        return parent == 1
    return "libtorch" not in libraries and not _is_script(parent)


def _is_script(process: int) -> bool:
    """Whether a process runs under the same torchrun, which its environment tells."""
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"{RUN_ID}={os.environ[RUN_ID]}".encode() in variables


def _scripts_between(parent: int) -> int:
    """The script that torchrun started and that started this process, maybe through others; 0: none."""
    script = 0
    while parent > 1 and _is_script(parent):
        script, parent = parent, _parent_of(parent)
    return script


def _parent_of(process: int) -> int:
    """-1 where the process has ended."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return -1


def _run(parent: int, command: list[str]) -> None:
    """Become `command`, bound to `parent`."""
    if _told_by_the_kernel():  # and it stays so in what takes this process's place
        if os.getppid() == parent:
            os.execvp(command[0], command)
        return
    import subprocess  # slow to import

    child = subprocess.Popen(command)

    def stop() -> None:
        child.terminate()  # torchrun ends its own
        end()

    follow_parent(parent, stop)
    sys.exit(child.wait())


if __name__ == "__main__":
    _run(int(sys.argv[1]), sys.argv[2:])
else:
    follow_torchrun()
