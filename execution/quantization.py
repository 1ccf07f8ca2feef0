"""Branches with weights of 8 bits, and the memory that weights need."""

import importlib.util

import torch
from torch import Tensor, nn

from backbones.contract import Backbone

QUANTIZATIONS = ("int8wo", "int8", "fp8")


class Fp8Linear(nn.Module):
    """A linear layer in float8: one scale per output for the weights, one per row for the inputs (..., in).

    Inputs are scaled when they arrive. Products are summed in float32 and returned in bfloat16. gelu: apply a
    GELU (tanh form) to the inputs first, in the same kernel.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        from execution import kernels

        self.rows_in_fp8, self.gelu = kernels.quantized, gelu
        weight, scale = kernels.quantized(linear.weight.detach(), False)
        self.weight = nn.Parameter(weight, requires_grad=False)  # (out, in)
        self.register_buffer("scale", scale.t())  # (1, out)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = self.rows_in_fp8(x.flatten(0, -2), self.gelu)
        out = torch._scaled_mm(
            rows, self.weight.t(), scale_a=scale, scale_b=self.scale, bias=self.bias,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
        return out.view(*x.shape[:-1], -1)


def quantize(model: Backbone, kind: str, device: torch.device) -> None:
    """Quantise the linear layers of all branches in place; those of the conditioning stay as they are.

    int8wo: weights in 8 bits, products in the model's dtype. int8: activations in 8 bits too, with one scale
    per token, so that no sample depends on its batch. Both need torchao. fp8: weights and activations in
    float8 (`Fp8Linear`); it needs weights in bfloat16 and a GPU of compute capability 8.9. Raises ValueError
    where something of this is missing.
    """
    if kind == "fp8":
        _check_fp8(model, device)
        for branch in model.branch_modules:
            use_fp8(branch)
        return
    try:
        from torchao import quantization
    except ImportError:
        raise ValueError(f"{kind} weights need torchao; install it with `pip install torchao`") from None
    config = {
        "int8wo": quantization.Int8WeightOnlyConfig,
        "int8": quantization.Int8DynamicActivationInt8WeightConfig,
    }[kind]()
    for branch in model.branch_modules:
        quantization.quantize_(branch, config)


def _check_fp8(model: Backbone, device: torch.device) -> None:
    if not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise ValueError(f"--quantize fp8 needs a GPU of compute capability 8.9, not {device}; take int8")
    if model.dtype != torch.bfloat16:
        raise ValueError("--quantize fp8 needs weights in bfloat16; add --precision bf16")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("--quantize fp8 needs triton; install it with `pip install triton`")


def use_fp8(module: nn.Module) -> None:
    """Replace every linear layer inside a module by an `Fp8Linear`; an MLP's GELU joins its second layer."""
    from timm.layers import Mlp  # slow to import

    if isinstance(module, Mlp) and isinstance(module.act, nn.GELU) and module.act.approximate == "tanh":
        module.fc1, module.act = Fp8Linear(module.fc1), nn.Identity()
        module.fc2 = Fp8Linear(module.fc2, gelu=True)
        return
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Fp8Linear(child))
        else:
            use_fp8(child)


def branch_weight_bytes(model: Backbone, quantization: str | None = None) -> list[int]:
    """Bytes of the linear layers of every branch (B,), before or after `quantize`; scales do not count."""
    found = []
    for branch in model.branch_modules:
        weights = [one.weight for one in branch.modules() if isinstance(one, nn.Linear | Fp8Linear)]
        found.append(sum(one.numel() if quantization else one.nbytes for one in weights))
    return found


def weight_bytes(model: Backbone, quantization: str | None = None) -> int:
    """Bytes of all weights, before or after `quantize`."""
    saved = sum(branch_weight_bytes(model)) - sum(branch_weight_bytes(model, quantization))
    return sum(parameter.nbytes for parameter in model.parameters()) - saved
