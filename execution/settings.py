"""How to execute: precision, device, compiler, CUDA graph, quantisation, dtype of the cache."""

import argparse
import dataclasses
from dataclasses import dataclass

import torch

from common import cli, devices
from execution.compilation import check_compiler
from execution.quantization import QUANTIZATIONS

CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ExecutionSettings:
    """None of it changes what is computed, but for rounding and, with `quantize`, the precision of weights.

    precision: a value of `devices.PRECISIONS`; None: the device's default. device: None: a GPU where there is
    one. compile: compile the branches. cuda_graph: replay each trajectory as one CUDA graph; None: with
    `compile` on a GPU. quantize: a value of `QUANTIZATIONS`. cache_dtype: dtype of the stored branch outputs,
    a key of `CACHE_DTYPES`; None: the model's dtype.
    """

    precision: str | None = None
    device: str | None = None
    compile: bool = False
    cuda_graph: bool | None = None
    quantize: str | None = None
    cache_dtype: str | None = None

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "ExecutionSettings":
        return cli.settings_from(cls, args)

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The dtype of stored branch outputs; None: the model's."""
        return CACHE_DTYPES.get(self.cache_dtype)

    def on(self, device: torch.device) -> "ExecutionSettings":
        """The same with `cuda_graph` decided for a device.

        Raises ValueError where the device or the installation cannot do what is asked.
        """
        if self.quantize in ("int8wo", "int8"):
            cli.require("torchao", f"--quantize {self.quantize}")
        if self.compile:
            check_compiler(device)
        if self.cuda_graph and device.type != "cuda":
            raise ValueError(f"--cuda-graph needs a GPU, not --device {device}; leave it out")
        if self.cuda_graph is not None:
            return self
        return dataclasses.replace(self, cuda_graph=self.compile and device.type == "cuda")


def add_arguments(parser: argparse.ArgumentParser, with_device: bool = True) -> None:
    """The flags of execution. with_device: those of precision and device too."""
    group = parser.add_argument_group("execution")
    group.add_argument("--compile", action="store_true", help="compile the branches (torch.compile)")
    group.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="capture the whole trajectory once and replay it (default: with --compile on a GPU)",
    )
    group.add_argument(
        "--quantize", choices=QUANTIZATIONS,
        help="quantise the linear layers of the branches: int8wo stores weights in 8 bits; int8 and fp8 also "
        "compute in 8 bits; int8wo and int8 need torchao",
    )  # fmt: skip
    group.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES,
        help="dtype of the stored branch outputs (default: the model's dtype)",
    )  # fmt: skip
    if with_device:
        devices.add_arguments(parser)
