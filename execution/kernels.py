"""Triton kernels for sampling on a GPU: the work of a branch on its rows between the matrix products.

One program has a whole row in registers, so a row is read once and written once. Without gradients. As
operators of torch they can be called from compiled functions and captured in a CUDA graph; with
TRITON_INTERPRET=1 in the environment they run on a CPU, slowly, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = tl.constexpr(torch.finfo(FP8).max)
SMALLEST_SCALE = tl.constexpr(1e-12)  # the scale of a row of zeros


@triton.jit
def _modulated_norm(
    x, shift, scale, out, shift_stride, scale_stride, tokens, width, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    sample, columns = row // tokens, tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values, 0) / width, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    scales = tl.load(scale + sample * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    shifts = tl.load(shift + sample * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, normed * scales + shifts, mask=inside)


@triton.jit
def _quantized(x, out, scales, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if GELU:  # v / 2 * (1 + tanh(u)) is v * sigmoid(2 u)
        values *= tl.sigmoid(1.5957691216057308 * (values + 0.044715 * values * values * values))
    scale = tl.maximum(tl.max(tl.abs(values), 0) / LARGEST, SMALLEST_SCALE)
    values = tl.minimum(tl.maximum(values / scale, -LARGEST), LARGEST)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def _launch(kernel, width: int, rows: int, *arguments, **constants) -> None:
    block = triton.next_power_of_2(width)
    kernel[(rows,)](*arguments, BLOCK=block, num_warps=4 if block <= 2048 else 8, **constants)


@torch.library.custom_op("harmonica::modulated_norm", mutates_args=())
def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`shift + scale * layer_norm(x)`, rounded once. x: (N, T, D); shift, scale (its 1 added): (N, 1, D)."""
    x, tokens, width = x.contiguous(), *x.shape[1:]
    shift, scale = (one if one.stride(2) == 1 else one.contiguous() for one in (shift, scale))
    out, strides = torch.empty_like(x), (shift.stride(0), scale.stride(0))
    _launch(_modulated_norm, width, len(x) * tokens, x, shift, scale, out, *strides, tokens, width, eps)
    return out


@torch.library.custom_op("harmonica::quantized", mutates_args=())
def quantized(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Rows (M, D) in float8, each by a scale of its own (M, 1), after GELU (its tanh form) where asked."""
    x, width = x.contiguous(), x.shape[1]
    out = torch.empty_like(x, dtype=FP8)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    _launch(_quantized, width, len(x), x, out, scales, width, GELU=gelu)
    return out, scales


@modulated_norm.register_fake
def _(x: Tensor, _shift: Tensor, _scale: Tensor, _eps: float) -> Tensor:
    return x.new_empty(x.shape)


@quantized.register_fake
def _(x: Tensor, _gelu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)
