"""A router training's state, its checkpoints, and the folder of a run.

A checkpoint is a router file (`0001000.safetensors`, readable by every command) that carries beside its
logits the state at the start of the round (for HarmoniCa a trajectory) in which it was written, under
`resume.*`. Noise, labels and data are drawn from (seed, round, sample index), so replaying that round gives
the same logits bit for bit.
"""

import json
import math
import re
from pathlib import Path

import safetensors
import torch
from torch import Tensor

import distributed
from router import Router, Schedule, find_router, save_router
from target import RegWeightControl, Target


class Training:
    """A router, its optimizer, lambda and beta, after `train_steps` steps of training.

    steps_per_round: a round is what a resumed run repeats as a whole, a trajectory for HarmoniCa. target:
    where given, beta starts at `reg_weight` and is moved until the schedule at `threshold` meets it.
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
    ):
        self.router = router.to(device)
        self.steps_per_round, self.threshold, self.target = steps_per_round, threshold, target
        self._fixed_reg_weight = reg_weight
        self._control = target and RegWeightControl(target, threshold, math.log(reg_weight))
        self.optimizer = torch.optim.AdamW(self.router.parameters(), lr=lr, weight_decay=0.0)
        distributed.average_gradients(self.optimizer)
        self.proxy_weights = torch.ones(router.num_steps, device=device)
        self.train_steps = 0
        self.mark_boundary()

    @property
    def round(self) -> int:
        """The round that the next train step belongs to."""
        return self.train_steps // self.steps_per_round

    @property
    def reg_weight(self) -> float:
        """beta"""
        return self._control.reg_weight if self._control else self._fixed_reg_weight

    @property
    def schedule(self) -> Schedule:
        """What sampling would compute now."""
        return self.router.schedule(self.threshold)

    @property
    def target_met(self) -> bool:
        return self.target is None or self.target.met(self.schedule)

    @property
    def between_rounds(self) -> bool:
        return self.train_steps % self.steps_per_round == 0

    def round_done(self, total_steps: int) -> None:
        """Between two rounds of a run of `total_steps`: move beta towards the target."""
        if self._control:
            per_row = [
                steps / self.router.num_steps
                for steps in (self.steps_per_round, total_steps - self.train_steps)
            ]
            self._control.update(self.router, self.optimizer, *per_row)
            self._control.log_weight = distributed.from_main(self._control.log_weight)  # to the last bit

    def mark_boundary(self) -> None:
        """A round begins: this is the state that the checkpoints written during it resume from."""
        self._boundary = self._state()

    def _state(self) -> dict[str, Tensor]:
        """Copies of everything that the coming round depends on."""
        rows = list(self.router.rows)
        moments = [self.optimizer.state.get(row) or _fresh_moments(row) for row in rows]
        state = {key: torch.stack([m[key] for m in moments]) for key in _fresh_moments(rows[0])}
        state |= {"logits": self.router.logits, "proxy_weights": self.proxy_weights}
        state["train_steps"] = torch.tensor(self.train_steps)
        if self._control:
            state["log_reg_weight"] = torch.tensor(self._control.log_weight, dtype=torch.float64)
        return {f"resume.{name}": tensor.detach().clone() for name, tensor in state.items()}

    def save(self, folder: Path, settings: dict, **facts) -> Path:
        """Write the checkpoint of this train step; `facts` go into the router file's metadata."""
        if self.between_rounds:
            self.mark_boundary()
        path = folder / f"{self.train_steps:07d}.safetensors"
        facts |= {"train_steps": self.train_steps, "settings": settings}
        boundary = {name: tensor.cpu() for name, tensor in self._boundary.items()}
        save_router(path, self.router, tensors=boundary, **facts)
        return path

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's `resume.*` tensors."""
        device = self.proxy_weights.device
        self.router.set_logits(state["resume.logits"])
        for i, row in enumerate(self.router.rows):
            moments = {key: state[f"resume.{key}"][i].clone() for key in _fresh_moments(row)}
            self.optimizer.state[row] = {k: m if k == "step" else m.to(device) for k, m in moments.items()}
        self.proxy_weights = state["resume.proxy_weights"].to(device)
        self.train_steps = int(state["resume.train_steps"])
        if self._control:
            self._control.log_weight = state["resume.log_reg_weight"].item()


def _fresh_moments(row: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a row before its first update; as in torch, the step count stays on the host."""
    return {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(row), "exp_avg_sq": torch.zeros_like(row)}


def read_checkpoint(path: Path, settings: dict) -> dict[str, Tensor]:
    """The `resume.*` tensors of a checkpoint. Raises ValueError where it is none, or of other settings."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys() if name.startswith("resume.")}  # noqa: SIM118
            found = json.loads((file.metadata() or {}).get("settings", "{}"))
    except safetensors.SafetensorError as error:
        raise ValueError(f"--resume {path}: no checkpoint of train_router.py ({error})") from None
    if "resume.train_steps" not in state or path.parent.name != "checkpoints":
        raise ValueError(f"--resume {path}: not a checkpoint in its run's folder; give that folder")
    for name, value in settings.items():
        if found.get(name) != value:
            flag = "ckpt, whose weights were" if name == "weights" else name.replace("_", "-")
            raise ValueError(f"--resume {path}: it was trained with --{flag} {found.get(name)}, not {value}")
    return state


def new_run_folder(results: Path, name: str) -> Path:
    """Make RESULTS/NNN-NAME/checkpoints with the next free number; returns RESULTS/NNN-NAME."""
    results.mkdir(parents=True, exist_ok=True)
    number = max((_number(path) for path in results.iterdir()), default=-1) + 1
    while True:
        folder = results / f"{number:03d}-{name}"
        try:
            folder.mkdir()
        except FileExistsError:  # another run took it just now
            number += 1
            continue
        (folder / "checkpoints").mkdir()
        return folder


def find_resumable(results: Path, resume: str, settings: dict) -> Path | None:
    """The checkpoint that `--resume` means; for `auto` the newest run's with these settings, or None."""
    if resume != "auto":
        return find_router(resume)
    for folder in sorted(results.glob("[0-9]*-*"), key=_number, reverse=True):
        try:
            newest = find_router(folder / "checkpoints")
            read_checkpoint(newest, settings)
            return newest
        except (ValueError, FileNotFoundError):  # another training's, or nothing saved yet
            continue
    return None


def _number(folder: Path) -> int:
    """NNN of a run's folder NNN-NAME; -1 for anything else."""
    match = re.match(r"(\d{3,})-", folder.name)
    return int(match[1]) if match else -1
