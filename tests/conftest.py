import json
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

from safetensors.torch import load_file

from diffusion import create_diffusion
from models import DiT

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


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


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()
