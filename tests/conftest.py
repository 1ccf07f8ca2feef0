import copy
import gc
import json
import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

from safetensors.torch import load_file

import end_to_end.any_speed
import training.rounds
from backbones.settings import ModelSettings
from common.distributed import Processes
from diffusion import create_diffusion
from models import DiT, DiT_models
from training import run
from training.settings import OutputSettings, TrainSettings

REFERENCE = Path(__file__).parent / "reference"
PICTURE = Image.effect_noise((100, 100), 50)


@pytest.fixture(scope="session", autouse=True)
def _quick_process():
    """One thread, and no garbage collection that looks at all the imported modules again."""
    torch.set_num_threads(1)
    gc.freeze()


@pytest.fixture(autouse=True)
def _quick_pictures(monkeypatch):
    """One picture for all checkpoints, but not in fixtures of modules: drawing takes longer than training."""
    monkeypatch.setattr("training.run.schedule_heat_map", lambda *_: PICTURE)


@pytest.fixture(scope="session")
def case() -> dict:
    """The setting of the reference numbers: a small DiT and a training."""
    return json.loads((REFERENCE / "case.json").read_text())


@pytest.fixture(scope="session")
def expected() -> dict[str, torch.Tensor]:
    """What the released implementations computed in that setting (CPU, float32, one thread)."""
    return load_file(REFERENCE / "expected.safetensors")


@pytest.fixture(scope="session")
def reference_model(case) -> DiT:
    model = DiT(**case["config"]).eval().requires_grad_(False)
    model.load_state_dict(load_file(REFERENCE / "dit.safetensors"))
    return model


@pytest.fixture(scope="session")
def tiny_model() -> DiT:
    """A DiT of four branches on 4 x 4 inputs, with weights so large that every branch matters."""
    torch.manual_seed(0)
    model = DiT(input_size=4, patch_size=2, hidden_size=24, depth=2, num_heads=2, num_classes=5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture
def tiny_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 4, 4, generator=generator), torch.tensor([0, 3, 1])


@pytest.fixture(scope="session")
def ten_steps():
    return create_diffusion("10")


@pytest.fixture
def small_dit(monkeypatch):
    """DiT-S/8 with two narrow blocks, for what does not depend on its 33 million weights."""
    narrow = partial(DiT, patch_size=8, hidden_size=48, depth=2, num_heads=3)
    monkeypatch.setitem(DiT_models, "DiT-S/8", narrow)


@contextmanager
def tiny_training(tiny_model: DiT, root: Path):
    """Train the tiny model from settings, in this process; `train` returns the run's folder, in `root`.

    The settings' model is only a name; `model` of the result is the one that is trained. Further arguments
    replace settings.
    """
    model = copy.deepcopy(tiny_model)
    model.source = "tiny"
    rounds = training.rounds.ROUNDS | end_to_end.any_speed.ROUNDS
    alone = Processes(0, 1, torch.device("cpu"))

    def train(method, folder="results", show=lambda _: None, processes=alone, **settings) -> Path:
        output = {"results_dir": root / folder, "log_every": 5, "ckpt_every": 5}
        output |= {name: settings.pop(name) for name in ("ckpt_every", "resume") if name in settings}
        settings = {"num_sampling_steps": "4", "global_batch_size": 4} | settings
        settings = TrainSettings(
            method, ModelSettings("DiT-tiny"), output=OutputSettings(**output), **settings
        )
        return run.train(settings, rounds, processes, show)

    train.model = model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelSettings, "load", lambda *_, **__: (model, None))
        patch.setattr("training.run.schedule_heat_map", lambda *_: PICTURE)
        yield train


@pytest.fixture
def train_tiny(tiny_model, tmp_path):
    with tiny_training(tiny_model, tmp_path) as train:
        yield train


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()
