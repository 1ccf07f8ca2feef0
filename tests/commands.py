"""Run the project's commands as a user would: in this process (imports are slow), or through torchrun."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from pathlib import Path
from unittest import mock

from safetensors.torch import load_file, save_file

from common import cli
from common.files import writing
from router import load_router

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def run(script: str, *arguments, status: int = 0) -> str:
    """What `python SCRIPT ARGUMENTS` prints, with its warnings; it must end with this exit status."""
    command = importlib.import_module(script.removesuffix(".py"))
    output, ended_with = io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [script, *map(str, arguments)]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        try:
            cli.run(command.main, command.parse_args())
        except SystemExit as ended:
            ended_with = ended.code
    text = output.getvalue() + "".join(f"warning: {warning.message}\n" for warning in caught)
    assert ended_with == status, f"exit status {ended_with}:\n{text[-4000:]}"
    return text


def torchrun(processes: int, *arguments, status: int = 0) -> str:
    """What `torchrun --nproc_per_node=PROCESSES ARGUMENTS` prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += map(str, arguments)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    text = done.stdout + done.stderr
    assert done.returncode == status, f"exit status {done.returncode}:\n{text[-4000:]}"
    return text


def error_line(script: str, *arguments) -> str:
    """The one line in which a wrong use ends, with exit status 2."""
    text = run(script, *arguments, status=2)
    lines = [line for line in text.splitlines() if re.match(r"[\w.]+: error: ", line)]
    assert len(lines) == 1, text
    return lines[0]


def write_old_settings(path: Path) -> None:
    """Make a checkpoint one from before `trajectories` and `groups`."""
    info = load_router(path).info
    settings = {name: value for name, value in info["settings"].items() if name != "groups"}
    if "trajectories" in settings:
        settings["global_batch_size"] = settings.pop("trajectories")
    facts = {name: value for name, value in info.items() if name != "path"} | {"settings": settings}
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    save_file(load_file(path), path, metadata=metadata)


@contextlib.contextmanager
def file_size_limit(size: int):
    """No file grows beyond `size` bytes: what a full disk is to a writer, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def writing_elsewhere(folder: Path):
    """Another process at work in a folder, and a child of it that outlives its kill; yields its number."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def write() -> None:
        with writing(folder):
            if child := os.fork():
                theirs.send(child)
            time.sleep(600)

    process = context.Process(target=write)
    process.start()
    child = ours.recv()
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()
        os.kill(child, signal.SIGKILL)


# ---- processes that are killed ---------------------------------------------------------------------

MARK = "TEST_MARK"  # a variable that every process that a test starts inherits


def start(command: list, **environment: str) -> subprocess.Popen:
    """A process whose descendants `alive` finds, however they were started; its output is dropped."""
    own = ENVIRONMENT | environment | {MARK: uuid.uuid4().hex}
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    process.mark = f"{MARK}={own[MARK]}".encode()
    return process


def start_torchrun(processes: int, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return start([*command, *arguments])


def alive(process: subprocess.Popen) -> list[int]:
    """The processes that run because `process` was started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and process.mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def wait_for(condition, process: subprocess.Popen | None = None, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        assert process is None or process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> list[int]:
    """Signal a process; returns what is left of it and its descendants two seconds later, and ends that."""
    process.send_signal(number)
    deadline = time.monotonic() + 2
    threading.Thread(target=process.wait, daemon=True).start()
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = alive(process)
    for one in left:
        os.kill(one, signal.SIGKILL)
    return left
