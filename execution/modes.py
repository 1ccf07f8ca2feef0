"""How a model is executed: compiled, captured as a CUDA graph, quantised, with a cache of another dtype.

None of it changes what is computed, but for rounding and, with `--quantize`, the precision of weights. A
schedule does not depend on the input, so a whole trajectory, sampler included, is one fixed graph.
"""

import argparse
import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cache import Combine, combined
from common import cli
from common.timing import captured
from models import DiT
from sampling.loop import Generators, Sample, Trajectory, denoise_loop, draw_step_noise, sample

CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLAGS = ("compile", "cuda_graph", "quantize", "cache_dtype")
QUANTIZATIONS = ("int8wo", "int8", "fp8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        help="weights of the branches: int8wo in 8 bits, int8 and fp8 activations too; int8 needs torchao",
    )  # fmt: skip
    group.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="of stored outputs (default: the model's)")


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, compute in one thread: several split products and sums, and round otherwise.

    What must come out the same to the last bit, whatever the processes and cores, is computed under this.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_available(args: argparse.Namespace, device: torch.device) -> None:
    """Raises ValueError where the device or the installation cannot do what the flags ask for."""
    if args.quantize in ("int8wo", "int8"):
        cli.require("torchao", f"--quantize {args.quantize}")
    if args.compile:
        check_compiler(device)
    if args.cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda-graph needs a GPU, not --device {device}; leave it out")


def check_compiler(device: torch.device) -> None:
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ValueError("--compile on a CPU needs a C++ compiler such as g++; install one or leave it out")


def prepare(args: argparse.Namespace, model: DiT, device: torch.device) -> Sample:
    """Quantise and compile `model` in place; returns what stands for `sampling.sample`.

    args.cuda_graph becomes what is done. Raises ValueError where the device or the installation cannot do it.
    """
    check_available(args, device)
    if args.quantize:
        quantize(model, args.quantize, device)
    if args.compile:
        if device.type == "cuda":
            fuse(model, args.quantize)
        compile_branches(model, device)
    if args.cuda_graph is None:
        args.cuda_graph = args.compile and device.type == "cuda"
    cache_dtype = CACHE_DTYPES.get(args.cache_dtype)
    combine = torch.compile(combined, dynamic=False) if args.compile else None
    if args.cuda_graph:
        return Captured(cache_dtype, combine)
    return partial(sample, cache_dtype=cache_dtype, combine=combine)


def compile_branches(model: DiT, device: torch.device) -> None:
    """Compile the two kinds of branches and what adds their outputs: three graphs, which every block repeats.

    What surrounds them is Python that decides per step and branch, so a schedule compiles nothing anew.
    """
    check_compiler(device)
    # By default the ninth shape (of batch size, dtype, number of stored outputs) would run uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    model.wrap_branches(partial(torch.compile, dynamic=False))
    model.wrap_additions(partial(torch.compile, dynamic=False))


def fuse(model: DiT, quantization: str | None = None) -> None:
    """Sampling on a GPU: what the compiler leaves apart, or does slowly, in one kernel each."""
    model.use_kernels(_fused_norm, FusedMlp if quantization is None else None)


def _fused_norm(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    from execution import kernels  # needs Triton, which is installed only where there are GPUs

    return kernels.modulated_norm(x, shift, scale, norm.eps)


class FusedMlp(nn.Module):
    """A block's MLP, its GELU in the epilogue of the first product: for sampling on a GPU.

    In place of timm's `Mlp`, whose layers it shares. Without gradients; unlike on a CPU, the GELU of the
    operator is the tanh approximation that DiT has.
    """

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        rows, weight = x.flatten(0, -2), self.fc1.weight.t()
        hidden = torch._addmm_activation(self.fc1.bias, rows, weight, use_gelu=True)
        return self.fc2(hidden).view_as(x)


class Fp8Linear(nn.Module):
    """A linear layer in float8: weights by a scale per output, inputs (..., in) by one per row as they come.

    Products are accumulated in float32 and leave in bfloat16. gelu: of the inputs first, in the same kernel.
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


def recompute_branches(model: DiT) -> None:
    """Activation checkpointing for training: keep a branch's input and run the branch again for its gradient.

    A third more time per update for a fraction of the memory; for 1024 px and above.
    """
    model.wrap_branches(lambda branch: partial(_recomputed, branch))


def _recomputed(branch: Callable[..., Tensor], *inputs) -> Tensor:
    if not torch.is_grad_enabled():
        return branch(*inputs)
    return checkpoint(branch, *inputs, use_reentrant=False, preserve_rng_state=False)


def quantize(model: DiT, kind: str, device: torch.device) -> None:
    """Quantise the linear layers of all branches in place, not those of the conditioning.

    int8wo: 8-bit weights, products in the model's dtype. int8: activations in 8 bits too, per token, so that
    no sample depends on its batch; both through torchao. fp8: as int8 in float8 (`Fp8Linear`), of bfloat16 on
    a GPU of compute capability 8.9.
    """
    if kind == "fp8":
        quantize_fp8(model, device)
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


def quantize_fp8(model: DiT, device: torch.device) -> None:
    if not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise ValueError(f"--quantize fp8 needs a GPU of compute capability 8.9, not {device}; take int8")
    if next(model.parameters()).dtype != torch.bfloat16:
        raise ValueError("--quantize fp8 needs weights in bfloat16; add --precision bf16")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("--quantize fp8 needs triton; install it with `pip install triton`")
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        attn.qkv, attn.proj = Fp8Linear(attn.qkv), Fp8Linear(attn.proj)
        mlp.fc1, mlp.act, mlp.fc2 = Fp8Linear(mlp.fc1), nn.Identity(), Fp8Linear(mlp.fc2, gelu=True)


def branch_weight_bytes(model: DiT, quantization: str | None = None) -> list[int]:
    """What the linear layers of every branch take, (B,), before or after `quantize`; scales left out."""
    found = []
    for branch in model.branch_modules:
        weights = [one.weight for one in branch.modules() if isinstance(one, nn.Linear | Fp8Linear)]
        found.append(sum(one.numel() if quantization else one.nbytes for one in weights))
    return found


def weight_bytes(model: DiT, quantization: str | None = None) -> int:
    """What all weights take."""
    saved = sum(branch_weight_bytes(model)) - sum(branch_weight_bytes(model, quantization))
    return sum(parameter.nbytes for parameter in model.parameters()) - saved


class Captured:
    """`sampling.sample` as a CUDA graph per trajectory and batch: captured at the first call, then replayed.

    Each graph keeps its own activations; inputs are copied into it and x_0 out of it.
    """

    def __init__(self, cache_dtype: torch.dtype | None = None, combine: Combine | None = None) -> None:
        self._store = {"dtype": cache_dtype, "combine": combine}
        self._captured: dict[tuple, _Graph] = {}

    def __call__(
        self, trajectory: Trajectory, labels: Tensor, noise: Tensor, generator: Generators = None
    ) -> Tensor:
        trajectory.check(labels, noise)
        inputs = [labels, noise]
        if (step_noise := draw_step_noise(trajectory, noise, generator)) is not None:
            inputs.append(step_noise)
        key = (id(trajectory), noise.shape, noise.dtype)  # the graph holds it, so that none takes its id
        if key not in self._captured:
            # Made outside: weights come from the host. Its store is empty after a trajectory.
            cache = trajectory.cache(**self._store)

            def run(labels: Tensor, noise: Tensor, step_noise: Tensor | None = None) -> Tensor:
                *_, (_, x_0) = denoise_loop(trajectory, labels, noise, cache, step_noise)
                return x_0

            self._captured[key] = _Graph(run, inputs)
        return self._captured[key](*inputs)


class _Graph:
    """A function of tensors, captured: its kernels are replayed without the host's part.

    What the function holds on the device is read by every replay, so the function is kept.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: list[Tensor]):
        self._inputs, self._function = [tensor.clone() for tensor in inputs], function
        self._graph, self._output = captured(lambda: function(*self._inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output.clone()
