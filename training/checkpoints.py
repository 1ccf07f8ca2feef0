"""The files of a run: its folder, its checkpoints, and which of them a resumed run goes on from.

A checkpoint is a router file (`0001000.safetensors`, readable by every command). Beside the logits it
carries, under `resume.*`, the state at the start of the round (for HarmoniCa a trajectory) in which it was
written. Noise, labels and data are drawn from (seed, round, sample index), so replaying that round gives the
same logits bit for bit.
"""

import json
import re
import zlib
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from common.files import make_folder
from common.identity import differences
from router import Router, find_router, save_router

PREFIX = "resume."


def write_checkpoint(
    folder: Path, train_steps: int, router: Router, state: dict[str, Tensor], **facts: object
) -> Path:
    """Write the checkpoint of this train step, FOLDER/0001000.safetensors.

    state: what a resumed run starts from, see `training.state.State`. facts: go into the metadata.
    """
    path = folder / f"{train_steps:07d}.safetensors"
    tensors = {f"{PREFIX}{name}": tensor.cpu().contiguous() for name, tensor in state.items()}
    tensors[f"{PREFIX}crc32"] = torch.tensor(checksum(tensors))
    save_router(path, router, tensors=tensors, train_steps=train_steps, **facts)
    return path


class Damaged(ValueError):
    """A file that does not read as a checkpoint."""


def read_checkpoint(path: Path, settings: dict) -> dict[str, Tensor]:
    """The state that a checkpoint holds, as `write_checkpoint` was given it.

    Raises Damaged where the file does not read or is no checkpoint, ValueError where its run had other
    settings.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys() if name.startswith(PREFIX)}  # noqa: SIM118
            found = json.loads((file.metadata() or {}).get("settings", "{}"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise Damaged(f"{path}: no checkpoint of train_router.py ({error})") from None
    state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    if "train_steps" not in state or not isinstance(found, dict):
        raise Damaged(f"{path}: a router without the state of its training")
    written = state.pop("crc32", None)  # older versions wrote none
    if written is not None and int(written) != checksum(state):
        raise Damaged(f"{path}: its numbers are not those that were written")
    before = found and "trajectories" not in found and "groups" not in found
    others = differences(_renamed(found) if before else found, settings)
    if others:
        name, value = others[0]
        flag = "ckpt, whose weights were" if name == "weights" else name.replace("_", "-")
        reason = f"--resume {path}: it was trained with --{flag} {value}, not {settings[name]}"
        if before and name == "trajectories":
            reason += "; when it began, --global-batch-size counted trajectories, not rows"
        raise OtherSettings(reason, bool(before) and {name for name, _ in others} <= _RENAMED)
    return state


class OtherSettings(ValueError):
    """A checkpoint of another training; `renamed`: the same command meant this one when it was written."""

    def __init__(self, reason: str, renamed: bool):
        super().__init__(reason)
        self.renamed = renamed


# What the same command line may mean today otherwise than when a run began.
_RENAMED = {"trajectories", "groups", "l1", "ste_threshold"}


def _renamed(settings: dict) -> dict:
    """Settings of a time when batches were not counted in rows and there were no groups, in today's terms."""
    if settings.get("method") == "l2c":
        return settings | {"groups": 1}
    return settings | {"trajectories": settings.get("global_batch_size")}


def checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 over the bytes of all tensors, in the order of their names."""
    crc = 0
    for _, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


# ---- the folder of a run ---------------------------------------------------------------------------


def runs(results: Path, name: str | None = None) -> list[Path]:
    """What `new_run_folder` made in a folder, of that name alone if given, the newest first.

    NNN-NAME has three figures, and more only beyond 999 as one run follows another: a folder that begins with
    a date is no run, nor is one without checkpoints/.
    """
    found = {}
    for path in results.iterdir() if results.is_dir() else ():
        match = re.fullmatch(r"(\d{3}|[1-9]\d{3,})-(.+)", path.name)
        if match and (path / "checkpoints").is_dir():
            found[path] = int(match[1]), match[2]
    numbers = {number for number, _ in found.values()}
    real = {number for number in numbers if number < 1000 or number - 1 in numbers}
    chosen = [(n, path) for path, (n, own) in found.items() if n in real and name in (None, own)]
    return [path for _, path in sorted(chosen, reverse=True)]


def new_run_folder(results: Path, name: str) -> Path:
    """Make RESULTS/NNN-NAME/checkpoints with the next free number; returns RESULTS/NNN-NAME."""
    make_folder(results)
    number = 1 + max((int(path.name.partition("-")[0]) for path in runs(results)), default=-1)
    while True:
        folder = results / f"{number:03d}-{name}"
        try:
            folder.mkdir()
        except FileExistsError:  # another run took it just now
            number += 1
            continue
        except OSError as error:
            raise OSError(f"{folder} cannot be made ({error.strerror}); give another folder") from error
        make_folder(folder / "checkpoints")
        return folder


def newest_state(run: Path, settings: dict, notes: list[str]) -> tuple[Path, dict[str, Tensor]] | None:
    """The newest checkpoint of a run that reads, and its tensors; None where there is none.

    What is skipped goes into `notes`, with the reason. Raises ValueError where the run has other settings.
    """
    found = (run / "checkpoints").iterdir()
    files = [path for path in found if re.fullmatch(r"\d{7,}\.safetensors", path.name)]
    for path in sorted(files, key=lambda path: int(path.stem), reverse=True):
        try:
            return path, read_checkpoint(path, settings)
        except Damaged as error:
            notes.append(f"skipped {error}")
    return None


def find_resumable(results: Path, resume: str, name: str, settings: dict, notes: list[str]) -> Path | None:
    """The run's folder or the checkpoint that `--resume` means.

    For `auto` the newest run NNN-NAME with these settings that has a checkpoint, or None; see `newest_state`.
    """
    if resume != "auto":
        path = Path(resume)
        folder = path.parent if path.name == "checkpoints" else path
        if (folder / "checkpoints").is_dir():
            return folder
        file = find_router(path)
        if file.parent.name != "checkpoints":
            raise ValueError(f"--resume {path}: not a checkpoint in its run's folder; give that folder")
        return file
    for run in runs(results, name):
        skipped: list[str] = []
        try:
            if newest_state(run, settings, skipped):
                return run
        except OtherSettings as other:
            if other.renamed:
                notes.append(f"{other}: a new run begins")
            continue
        notes += skipped
    return None


def resumed_state(path: Path, settings: dict, notes: list[str]) -> tuple[Path, dict[str, Tensor]]:
    """The checkpoint that a run goes on from, and its tensors; path: of `find_resumable`.

    Raises ValueError where none reads, or where it is of other settings.
    """
    if path.is_dir():
        skipped: list[str] = []
        newest = newest_state(path, settings, skipped)
        if newest is None:
            raise ValueError("; ".join([f"--resume {path}: no checkpoint of it reads", *skipped]))
        notes += skipped
        return newest
    try:
        return path, read_checkpoint(path, settings)
    except Damaged as error:
        raise ValueError(f"--resume {error}; give its run's folder for the newest that reads") from None
