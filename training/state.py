"""A router training's state, its checkpoints, and the folder of a run.

A checkpoint is a router file (`0001000.safetensors`, readable by every command) that carries beside its
logits the state at the start of the round (for HarmoniCa a trajectory) in which it was written, under
`resume.*`. Noise, labels and data are drawn from (seed, round, sample index), so replaying that round gives
the same logits bit for bit.
"""

import json
import math
import re
import zlib
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from common import distributed
from common.files import make_folder
from common.identity import differences
from router import Router, Schedule, find_router, save_router
from training.target import RegWeightControl, Target


class Training:
    """What every method's training has: train steps, a schedule that sampling would take, checkpoints.

    steps_per_round: a round is what a resumed run repeats as a whole, a trajectory for HarmoniCa.
    """

    def __init__(self, steps_per_round: int, target: Target | None):
        self.steps_per_round, self.target = steps_per_round, target
        self.train_steps = 0

    @property
    def round(self) -> int:
        """The round that the next train step belongs to."""
        return self.train_steps // self.steps_per_round

    @property
    def schedule(self) -> Schedule:
        """What sampling would compute now."""
        raise NotImplementedError

    @property
    def router_to_save(self) -> Router:
        raise NotImplementedError

    def facts(self) -> dict:
        """What the file of a router says of its training beyond its settings."""
        return {}

    def figures(self) -> dict:
        """What a line of metrics.jsonl holds beyond the losses."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Everything that the coming round depends on, but the number of train steps."""
        raise NotImplementedError

    def set_state(self, state: dict[str, Tensor]) -> None:
        raise NotImplementedError

    @property
    def target_met(self) -> bool:
        return self.target is None or self.target.met(self.schedule)

    @property
    def between_rounds(self) -> bool:
        return self.train_steps % self.steps_per_round == 0

    def round_done(self, total_steps: int) -> None:
        """Between two rounds of a run of `total_steps`."""

    def mark_boundary(self) -> None:
        """A round begins: this is the state that the checkpoints written during it resume from."""
        state = self.state() | {"train_steps": torch.tensor(self.train_steps)}
        self._boundary = {f"resume.{name}": tensor.detach().clone() for name, tensor in state.items()}

    def save(self, folder: Path, settings: dict, **facts) -> Path:
        """Write the checkpoint of this train step; `facts` go into the router file's metadata."""
        if self.between_rounds:
            self.mark_boundary()
        path = folder / f"{self.train_steps:07d}.safetensors"
        facts |= self.facts() | {"train_steps": self.train_steps, "settings": settings}
        boundary = {name: tensor.cpu().contiguous() for name, tensor in self._boundary.items()}
        boundary["resume.crc32"] = torch.tensor(checksum(boundary))
        save_router(path, self.router_to_save, tensors=boundary, **facts)
        return path

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's `resume.*` tensors."""
        state = {name.removeprefix("resume."): tensor for name, tensor in state.items()}
        self.train_steps = int(state.pop("train_steps"))
        self.set_state(state)


class RowTraining(Training):
    """A router whose rows are trained apart, its optimizer, lambda and beta.

    target: where given, beta starts at `reg_weight` and is moved until the schedule at `threshold` meets it.
    rows_per_step: the rows that a train step updates, on average.
    """

    def __init__(
        self,
        router: Router,
        lr: float,
        device: torch.device,
        steps_per_round: int,
        threshold: float,
        reg_weight: float,
        target: Target | None = None,
        rows_per_step: float = 1.0,
    ):
        super().__init__(steps_per_round, target)
        self.router, self.threshold = router.to(device), threshold
        self.rows_per_step = rows_per_step
        self._fixed_reg_weight = reg_weight
        self._control = target and RegWeightControl(target, threshold, math.log(reg_weight))
        self.optimizer = torch.optim.AdamW(self.router.parameters(), lr=lr, weight_decay=0.0, fused=True)
        self.proxy_weights = torch.ones(router.num_steps, device=device)
        self.mark_boundary()

    @property
    def reg_weight(self) -> float:
        """beta"""
        return self._control.reg_weight if self._control else self._fixed_reg_weight

    @property
    def schedule(self) -> Schedule:
        return self.router.schedule(self.threshold)

    @property
    def router_to_save(self) -> Router:
        return self.router

    def facts(self) -> dict:
        return {"reg_weight": self.reg_weight}

    def figures(self) -> dict:
        return {"reg_weight": self.reg_weight, "proxy_weights": self.proxy_weights.tolist()}

    def round_done(self, total_steps: int) -> None:
        """Move beta towards the target."""
        if self._control:
            per_row = [
                steps * self.rows_per_step / self.router.num_steps
                for steps in (self.steps_per_round, total_steps - self.train_steps)
            ]
            self._control.update(self.router, self.optimizer, *per_row)
            self._control.log_weight = distributed.from_main(self._control.log_weight)  # to the last bit

    def state(self) -> dict[str, Tensor]:
        rows = list(self.router.rows)
        moments = [self.optimizer.state.get(row) or fresh_moments(row) for row in rows]
        state = {key: torch.stack([m[key] for m in moments]) for key in fresh_moments(rows[0])}
        state |= {"logits": self.router.logits, "proxy_weights": self.proxy_weights}
        if self._control:
            state["log_reg_weight"] = torch.tensor(self._control.log_weight, dtype=torch.float64)
        return state

    def set_state(self, state: dict[str, Tensor]) -> None:
        self.router.set_logits(state["logits"])
        for i, row in enumerate(self.router.rows):
            set_moments(self.optimizer, row, {key: state[key][i] for key in fresh_moments(row)})
        self.proxy_weights = state["proxy_weights"].to(self.proxy_weights.device)
        if self._control:
            self._control.log_weight = state["log_reg_weight"].item()


def fresh_moments(parameter: Tensor) -> dict[str, Tensor]:
    """Adam's state of a parameter before its first update."""
    zeros = torch.zeros_like(parameter)
    step = torch.zeros((), device=parameter.device)
    return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def set_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, moments: dict[str, Tensor]) -> None:
    optimizer.state[parameter] = {
        key: moment.to(parameter.device, copy=True) for key, moment in moments.items()
    }


class Damaged(ValueError):
    """A file that does not read as a checkpoint."""


def read_checkpoint(path: Path, settings: dict) -> dict[str, Tensor]:
    """The `resume.*` tensors of a checkpoint.

    Raises Damaged where it does not read or is none, ValueError where it is of other settings.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys() if name.startswith("resume.")}  # noqa: SIM118
            found = json.loads((file.metadata() or {}).get("settings", "{}"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise Damaged(f"{path}: no checkpoint of train_router.py ({error})") from None
    if "resume.train_steps" not in state or not isinstance(found, dict):
        raise Damaged(f"{path}: a router without the state of its training")
    written = state.pop("resume.crc32", None)  # older versions wrote none
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
