"""What trainings leave on disk, whole or not at all: their state, and models in diffusers' folders."""

import tempfile
from pathlib import Path

import torch

from common.files import load_pickle_safely, replacing


def iteration_seed(seed: int, iteration: int) -> int:
    """The seed of one iteration's draws: so a resumed training draws what an uninterrupted one would."""
    return seed + 1_000_003 * (iteration + 1)


class TrainingState:
    """Saves and loads `parts` (name -> object with state_dict) with the iteration and the seconds so far.

    settings: what decides the numbers; a state of other settings is refused.
    """

    def __init__(self, path: Path, settings: dict, parts: dict):
        self.path, self.settings, self.parts = path, settings, parts
        self.iteration, self.seconds = 0, 0.0

    def resume(self) -> None:
        """Load the state if there is one. Raises ValueError where it is damaged or of another training."""
        if not self.path.exists():
            return
        state = load_pickle_safely(self.path)
        if not isinstance(state, dict) or state.get("settings") != self.settings:
            found = state.get("settings") if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"{self.path} is of a training with {found}; go on with those or remove it")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        print(f"going on from iteration {self.iteration}", flush=True)

    def save(self, iteration: int, seconds: float) -> None:
        self.iteration, self.seconds = iteration, seconds
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"settings": self.settings, "iteration": iteration, "seconds": seconds}
        with replacing(self.path) as partial:
            torch.save(state, partial)


def write_folder(model, folder: Path) -> None:
    """`model.save_pretrained`, of a model or a pipeline; each file replaces an older one when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.part") as scratch:
        model.save_pretrained(scratch)
        for file in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            with replacing(folder / file.relative_to(scratch)) as partial:
                file.replace(partial)
