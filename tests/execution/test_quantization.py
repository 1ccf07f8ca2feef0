"""Which layers are quantised: those of the branches, as the contract of a backbone names them."""

import copy

import pytest
import torch
from timm.layers import Mlp
from torch import nn

from execution import quantization
from execution.quantization import use_fp8


class Marked(nn.Module):
    """Stands for `Fp8Linear`: which layer it took, and whether a GELU goes with it."""

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        self.linear, self.gelu = linear, gelu

    def forward(self, x):
        return self.linear(nn.functional.gelu(x, approximate="tanh") if self.gelu else x)


@pytest.fixture
def _marked(monkeypatch):
    monkeypatch.setattr(quantization, "Fp8Linear", Marked)


@pytest.mark.usefixtures("_marked")
def test_all_linear_layers_of_branches_and_no_other(tiny_model, tiny_batch):
    model, (noise, labels) = copy.deepcopy(tiny_model), tiny_batch
    t = torch.full((3,), 500)
    expected = model(noise, t, labels)
    for branch in model.branch_modules:
        use_fp8(branch)
    assert torch.equal(model(noise, t, labels), expected)
    marked = [name for name, module in model.named_modules() if isinstance(module, Marked)]
    assert marked == [
        f"blocks.{k}.{name}" for k in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert [model.get_submodule(name).gelu for name in marked] == [False, False, False, True] * 2


@pytest.mark.usefixtures("_marked")
def test_another_activation_stays_where_it_is():
    """The kernel has the tanh form alone."""
    x = torch.randn(2, 3, 8)
    for activation in (nn.GELU, nn.SiLU):
        branch = nn.ModuleDict({"ff": Mlp(8, 16, act_layer=activation)}).eval()
        expected = branch["ff"](x)
        use_fp8(branch)
        assert isinstance(branch["ff"].act, activation)
        assert [branch["ff"].fc1.gelu, branch["ff"].fc2.gelu] == [False, False]
        assert torch.equal(branch["ff"](x), expected)
