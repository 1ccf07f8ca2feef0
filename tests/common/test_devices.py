"""Devices, precisions and threads."""

import argparse

import pytest
import torch

from common import devices

CPU = torch.device("cpu")


@pytest.fixture
def _flags_put_back():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("_flags_put_back")
@pytest.mark.parametrize(
    ("asked", "device", "name", "dtype"),
    [
        (None, "cpu", "fp32", torch.float32),
        ("bf16", "cpu", "bf16", torch.bfloat16),
        (None, "cuda", "tf32", torch.float32),
        ("fp32", "cuda", "fp32", torch.float32),
        ("bf16", "cuda", "bf16", torch.bfloat16),
    ],
)
def test_precision_of_a_device(asked, device, name, dtype):
    assert devices.set_precision(asked, torch.device(device)) == (name, dtype)
    assert torch.backends.cuda.matmul.allow_tf32 == (name == "tf32")
    assert torch.backends.cudnn.allow_tf32 == (name == "tf32")


@pytest.mark.usefixtures("_flags_put_back")
def test_tf32_on_a_cpu_is_said_to_have_no_effect():
    with pytest.warns(UserWarning, match="--precision tf32 has no effect on a CPU"):
        assert devices.set_precision("tf32", CPU) == ("fp32", torch.float32)
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_device_that_is_not_there_is_refused():
    assert devices.choose_device("cpu") == CPU
    for name in ("cuda:99", "gpu"):
        with pytest.raises(ValueError, match=f"--device {name} cannot be used .*; use cpu or leave it out"):
            devices.choose_device(name)


def test_hardware_names_the_threads():
    assert devices.hardware(CPU).endswith(f", {torch.get_num_threads()} threads")


def test_one_thread_is_for_a_cpu_alone_and_ends():
    torch.set_num_threads(3)
    try:
        with devices.one_thread(CPU):
            assert torch.get_num_threads() == 1
        with devices.one_thread(torch.device("cuda")):
            assert torch.get_num_threads() == 3
        with pytest.raises(KeyError), devices.one_thread(CPU):
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_flags():
    parser = argparse.ArgumentParser()
    devices.add_arguments(parser)
    args = parser.parse_args(["--precision", "bf16", "--local_rank=2"])
    assert (args.precision, args.device, args.local_rank) == ("bf16", None, 2)
    assert "local" not in parser.format_help()
