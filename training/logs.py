"""A training's record: its losses, log.txt, metrics.jsonl, heat maps, and Weights & Biases on request."""

import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from common import distributed
from common.files import append_line, replacing, to_json
from objectives import TrainStep

WANDB_TIMEOUT_S = 30
to_logger = logging.getLogger(__name__).info
LOSSES = ("loss", "data_loss", "score_sum")


class LossLog:
    """Losses since the last line of the log. They stay on the device until `settle` or `summary`."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, TrainStep]] = []
        self._values: list[list[float]] = []

    def add(self, train_steps: int, update: TrainStep) -> None:
        self._pending.append((train_steps, update))

    def __len__(self) -> int:
        """How many losses are still on the device."""
        return len(self._pending)

    def settle(self) -> None:
        """Average the pending losses over ranks and bring them to the host, in one exchange.

        Raises ValueError where a loss is NaN or infinite, naming the step.
        """
        if not self._pending:
            return
        rows = [torch.stack([getattr(update, name) for name in LOSSES]) for _, update in self._pending]
        values = distributed.mean(torch.stack(rows)).tolist()
        for (train_steps, update), (loss, *_) in zip(self._pending, values, strict=True):
            if not math.isfinite(loss):
                where = f"step {update.step}" if isinstance(update.step, int) else f"steps {update.step}"
                raise ValueError(
                    f"the loss is {loss} at train step {train_steps} (denoising {where}); the "
                    "last checkpoint is intact; check the model's weights, lower --lr or use --precision fp32"
                )
        self._pending.clear()
        self._values += values

    def summary(self) -> dict[str, float]:
        """Means since the last summary, by the names in LOSSES; empty where nothing was trained since."""
        self.settle()
        values, self._values = self._values, []
        means = [sum(column) / len(values) for column in zip(*values, strict=True)]
        return dict(zip(LOSSES, means, strict=False))


class RunLog:
    """Writes a run's record on rank 0; with `folder=None` (every other rank) it does nothing.

    show: gets every line of log.txt, for the console.
    """

    def __init__(
        self,
        folder: Path | None,
        wandb_config: dict | None = None,
        show: Callable[[str], None] = to_logger,
    ):
        self.folder, self._show = folder, show
        self._wandb = None
        if folder is not None and wandb_config is not None:
            self._wandb = start_wandb(folder, wandb_config)

    def info(self, text: str) -> None:
        """One line of log.txt."""
        if self.folder is not None:
            self._show(text)
            append_line(self.folder / "log.txt", text)

    def metrics(self, train_steps: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        if self.folder is None:
            return
        append_line(self.folder / "metrics.jsonl", to_json({"train_steps": train_steps, **values}))
        if self._wandb is not None:
            self._wandb.log(values, step=train_steps)

    def picture(self, train_steps: int, name: str, image: Image.Image) -> None:
        """Write NAME.png in place of the last one."""
        if self.folder is None:
            return
        with replacing(self.folder / f"{name}.png") as temporary:
            image.save(temporary)
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=train_steps)

    def forget_after(self, train_steps: int) -> None:
        """Drop the metrics of steps that a resumed run takes again, and lines that are half-written."""
        path = self.folder and self.folder / "metrics.jsonl"
        if path and path.exists():
            lines = path.read_bytes().splitlines()
            kept = [line for line in lines if _steps_of(line) <= train_steps]
            with replacing(path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in kept))

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


def _steps_of(line: bytes) -> float:
    """The train steps of a line of metrics.jsonl; infinite where the line does not read."""
    try:
        return float(json.loads(line)["train_steps"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def start_wandb(folder: Path, config: dict):
    """A wandb run of this training. Without a network or a login it is offline, with a warning."""
    import wandb

    options = {"project": "harmonica", "name": folder.name, "dir": str(folder), "config": config}
    settings = wandb.Settings(silent=True, init_timeout=WANDB_TIMEOUT_S, login_timeout=WANDB_TIMEOUT_S)
    try:
        return wandb.init(**options, settings=settings)
    except Exception as error:  # wandb raises many kinds of error for one cause
        reason = str(error).partition("\n")[0] or type(error).__name__
        warnings.warn(f"--wandb: {reason}: logging offline, `wandb sync {folder}/wandb/offline-*` uploads it")
        return wandb.init(**options, settings=settings, mode="offline")
