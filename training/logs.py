"""A training's record: console, log.txt, metrics.jsonl, heat maps, and Weights & Biases where asked for."""

import json
import math
import warnings
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common.files import append_line, replacing, to_json

WANDB_TIMEOUT_S = 30


class RunLog:
    """Writes a run's record on rank 0; with `folder=None` (every other rank) it does nothing."""

    def __init__(self, folder: Path | None, wandb_config: dict | None = None):
        self.folder = folder
        self._wandb = None
        if folder is not None and wandb_config is not None:
            self._wandb = start_wandb(folder, wandb_config)

    def info(self, text: str) -> None:
        if self.folder is not None:
            tqdm.write(text)
            append_line(self.folder / "log.txt", text)

    def metrics(self, train_steps: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        if self.folder is None:
            return
        append_line(self.folder / "metrics.jsonl", to_json({"train_steps": train_steps, **values}))
        if self._wandb is not None:
            self._wandb.log(values, step=train_steps)

    def picture(self, train_steps: int, name: str, image: Image.Image) -> None:
        """NAME.png, the newest in the place of the last."""
        if self.folder is None:
            return
        with replacing(self.folder / f"{name}.png") as temporary:
            image.save(temporary)
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=train_steps)

    def forget_after(self, train_steps: int) -> None:
        """Drop the metrics of steps that a resumed run takes again, and what a kill left half-written."""
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
    """The train steps of a line of metrics.jsonl; infinite where it does not read."""
    try:
        return float(json.loads(line)["train_steps"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def start_wandb(folder: Path, config: dict):
    """A wandb run of this training; offline, with a warning, without a network or without a login."""
    import wandb

    options = {"project": "harmonica", "name": folder.name, "dir": str(folder), "config": config}
    settings = wandb.Settings(silent=True, init_timeout=WANDB_TIMEOUT_S, login_timeout=WANDB_TIMEOUT_S)
    try:
        return wandb.init(**options, settings=settings)
    except Exception as error:  # wandb's kinds of error are many, their cause is one
        reason = str(error).partition("\n")[0] or type(error).__name__
        warnings.warn(f"--wandb: {reason}: logging offline, `wandb sync {folder}/wandb/offline-*` uploads it")
        return wandb.init(**options, settings=settings, mode="offline")
