"""Run the project's commands as a user would: in this process (imports are slow), or through torchrun."""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

from safetensors.torch import load_file, save_file

import cli
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
