"""Triton kernels against plain torch in float64; without a GPU they are interpreted."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from diffusion import create_diffusion
from execution import fuse
from execution.quantization import Fp8Linear
from sampling.loop import generate

pytest.importorskip("triton")
kernels = importlib.import_module("execution.kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_modulated_norm(draw, dtype, bound):
    """Of rows of a width that is no power of two, and of shifts and scales that are parts of a tensor."""
    x, modulation = (3 * draw(3, 5, 72) + 1).to(dtype), draw(3, 1, 144).to(dtype)
    shift, scale = modulation.chunk(2, dim=-1)
    expected = shift.double() + scale.double() * F.layer_norm(x.double(), (72,), eps=1e-6)
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        normed = kernels.modulated_norm(given, shift, scale, 1e-6)
        assert normed.dtype == dtype
        assert relative_error(normed, expected) < bound


@pytest.mark.parametrize("gelu", [False, True])
def test_rows_are_scaled_to_the_range_of_float8(draw, gelu):
    rows = draw(7, 72).bfloat16()
    rows[3] = 0
    expected = F.gelu(rows.double(), approximate="tanh") if gelu else rows.double()
    scaled, scales = torch.empty(7, 72, device=DEVICE), torch.empty(7, 1, device=DEVICE)
    kernels._launch(kernels._quantized, 72, 7, rows, scaled, scales, 72, GELU=gelu)  # kept in float32
    assert relative_error(scaled * scales, expected) < 1e-6
    assert scaled.abs().amax(1).tolist() == pytest.approx([448, 448, 448, 0, 448, 448, 448])
    in_eight_bits, same_scales = kernels.quantized(rows, gelu)
    assert torch.equal(same_scales, scales)
    assert in_eight_bits.dtype == torch.float8_e4m3fn
    # The interpreter rounds to float8 without its carry: 1.99 becomes 1.
    assert relative_error(in_eight_bits.float() * scales, expected) < (0.03 if DEVICE == "cuda" else 0.1)


def test_a_sampler_with_fused_norms_draws_the_same(tiny_model, tiny_batch):
    chain = create_diffusion("3")  # the interpreter is slow
    noise, labels = (tensor.to(DEVICE) for tensor in tiny_batch)
    plain = copy.deepcopy(tiny_model).to(DEVICE)
    fused = copy.deepcopy(plain)
    fuse(fused, "int8")  # the norms alone: the fused MLP is of GPUs
    expected = generate(plain, chain, labels, noise, 1.5)
    assert relative_error(generate(fused, chain, labels, noise, 1.5), expected) < 1e-4


def test_linear_layer_in_float8(draw):
    linear = torch.nn.Linear(64, 96).to(DEVICE, torch.bfloat16)
    torch.nn.init.normal_(linear.weight, generator=torch.Generator(DEVICE).manual_seed(0))
    x = draw(2, 5, 64).bfloat16()
    for gelu in (False, True):
        expected = F.linear(F.gelu(x.double(), approximate="tanh") if gelu else x.double(),
                            linear.weight.double(), linear.bias.double())  # fmt: skip
        try:
            out = Fp8Linear(linear, gelu)(x)
        except RuntimeError as error:
            pytest.skip(f"no product of float8 rows here: {error}")
        assert out.dtype == torch.bfloat16
        assert relative_error(out, expected) < (0.05 if DEVICE == "cuda" else 0.1)
