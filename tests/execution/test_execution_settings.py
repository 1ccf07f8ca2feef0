"""How to execute: defaults of a device, and what it cannot do."""

import argparse
import sys

import pytest
import torch

from common import cli
from execution import ExecutionSettings
from execution import settings as execution_settings

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_flags_give_the_settings():
    parser = argparse.ArgumentParser()
    execution_settings.add_arguments(parser)
    words = [
        "--compile",
        "--no-cuda-graph",
        "--cache-dtype",
        "fp16",
        "--precision",
        "bf16",
        "--device",
        "cpu",
    ]
    settings = ExecutionSettings.from_arguments(cli.parse(parser, words))
    assert settings == ExecutionSettings("bf16", "cpu", True, False, None, "fp16")
    assert settings.stored_dtype == torch.float16
    assert ExecutionSettings.from_arguments(cli.parse(parser, [])) == ExecutionSettings()
    assert ExecutionSettings().stored_dtype is None


@pytest.mark.parametrize(
    ("settings", "device", "graph"),
    [
        (ExecutionSettings(), CPU, False),
        (ExecutionSettings(), GPU, False),
        (ExecutionSettings(compile=True), CPU, False),
        (ExecutionSettings(compile=True), GPU, True),
        (ExecutionSettings(compile=True, cuda_graph=False), GPU, False),
        (ExecutionSettings(cuda_graph=True), GPU, True),
    ],
)
def test_a_graph_comes_with_the_compiler_on_a_gpu(settings, device, graph, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)  # as if there were a compiler
    assert settings.on(device).cuda_graph == graph


def test_what_is_not_there_is_named(monkeypatch):
    with pytest.raises(ValueError, match="--cuda-graph needs a GPU, not --device cpu"):
        ExecutionSettings(cuda_graph=True).on(CPU)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match="--quantize int8wo needs torchao"):
        ExecutionSettings(quantize="int8wo").on(CPU)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        ExecutionSettings(compile=True).on(CPU)
    assert ExecutionSettings(compile=True).on(GPU).compile
