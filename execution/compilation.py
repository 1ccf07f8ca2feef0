"""Compiled branches (torch.compile), the kernels for a GPU, and branches that are run again for gradients."""

import shutil
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.contract import Backbone
from models import DiT


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where a CPU's compiler is missing."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ValueError("--compile on a CPU needs a C++ compiler such as g++; install one or leave it out")


def compile_branches(model: Backbone, device: torch.device) -> None:
    """Compile the branches and the additions of their outputs: a graph per kind, which all blocks share.

    A DiT has three: two branches and the addition; a PixArt has three branches, and the library adds.
    Python code around them decides per step and branch, so another schedule compiles nothing anew.
    """
    check_compiler(device)
    # By default the ninth shape (of batch size, dtype, number of stored outputs) would run uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    model.wrap_branches(partial(torch.compile, dynamic=False))
    model.wrap_additions(partial(torch.compile, dynamic=False))


def fuse(model: DiT, quantization: str | None = None) -> None:
    """For sampling on a GPU: one kernel for a norm with its modulation, one for a product with its GELU."""
    model.use_kernels(_fused_norm, FusedMlp if quantization is None else None)


def _fused_norm(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    from execution import kernels  # needs Triton, which is installed only where there are GPUs

    return kernels.modulated_norm(x, shift, scale, norm.eps)


class FusedMlp(nn.Module):
    """A block's MLP whose first product applies the GELU before it writes its result; for sampling on a GPU.

    It takes the place of timm's `Mlp` and shares its layers. It has no gradient. On a GPU the operator's GELU
    is the tanh approximation, as in DiT; on a CPU it is not.
    """

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        rows, weight = x.flatten(0, -2), self.fc1.weight.t()
        hidden = torch._addmm_activation(self.fc1.bias, rows, weight, use_gelu=True)
        return self.fc2(hidden).view_as(x)


def recompute_branches(model: Backbone) -> None:
    """Activation checkpointing for training: keep a branch's input and run the branch again for its gradient.

    An update takes a third more time and a fraction of the memory; worth it for 1024 px and above.
    """
    model.wrap_branches(lambda branch: partial(_recomputed, branch))


def _recomputed(branch: Callable[..., Tensor], *inputs, **named) -> Tensor:
    if not torch.is_grad_enabled():
        return branch(*inputs, **named)
    return checkpoint(branch, *inputs, use_reentrant=False, preserve_rng_state=False, **named)
