"""A training's record: console, log.txt, metrics.jsonl, heat maps, and Weights & Biases where asked for."""

import json
import warnings
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from files import replacing

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
            with open(self.folder / "log.txt", "a") as file:
                file.write(text + "\n")

    def metrics(self, train_steps: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        if self.folder is None:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"train_steps": train_steps, **values}, allow_nan=False) + "\n")
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
        """Drop the metrics of steps that a resumed run takes again."""
        path = self.folder and self.folder / "metrics.jsonl"
        if path and path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["train_steps"] <= train_steps]
            with replacing(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


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
