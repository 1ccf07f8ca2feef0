"""Pickles that are not read: where they ask for what, and whether the way out that is told leads out."""

import argparse
import collections
import os
import pathlib
import pickle
import re

import numpy as np
import pytest
import torch

from common.files import load_pickle_safely
from models import DiT


class Config:
    """A training's own class."""


STATE = {"w": torch.ones(3)}
TINY = {"input_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 1, "num_classes": 2}
CASES = {
    "path": ({"ema": STATE, "args": argparse.Namespace(data=pathlib.PosixPath("/x"))}, r"'args\.data'"),
    "path in a dict": ({"ema": STATE, "config": {"out": pathlib.PosixPath("/x")}}, r"'config\.out'"),
    "numpy scalar": ({"ema": STATE, "best": np.float64(2), "n": np.int64(1)}, "'best', 'n'"),
    "numpy arrays": ({f"{i}": np.ones(2) for i in range(9)} | STATE, "'0', '1', '2' and 6 more"),
    "defaultdict": (collections.defaultdict(list, STATE), "collections.defaultdict"),
    "defaultdict below": ({"ema": collections.defaultdict(list, STATE), "step": 3}, "'ema'"),
    "own class": ({"ema": STATE, "cfg": Config()}, "Config .in 'cfg'"),
    "line break": ({"ema": STATE, "a\nb": Config()}, r"'a\\nb'"),
    "module": (DiT(**TINY), "models.DiT"),
    "module below": ({"model": DiT(**TINY), "step": 3}, "'model'"),
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_refused_file_says_where_and_how_to_save_it_without(tmp_path, monkeypatch, name, is_zip):
    content, words = CASES[name]
    file = tmp_path / "run.pt"
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=f"was refused: it asks for .*{words}") as info:
        load_pickle_safely(file)
    assert "\n" not in str(info.value)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"in Python: (.*)$", str(info.value))[1], {})
    clean = load_pickle_safely(tmp_path / "clean.pt")
    tensors = clean.get("ema", clean.get("model", clean))
    assert any(isinstance(value, torch.Tensor) for value in tensors.values())


def test_bare_pickle_is_told_from_a_torch_file(tmp_path, monkeypatch):
    file = tmp_path / "run.pkl"
    file.write_bytes(pickle.dumps({"epoch": 3, "values": [1.0]}))
    with pytest.raises(ValueError, match="no torch file but a bare pickle") as info:
        load_pickle_safely(file)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"in Python: (.*)$", str(info.value))[1], {})
    assert load_pickle_safely(tmp_path / "clean.pt")["epoch"] == 3


class RunsCode:
    def __init__(self, target: pathlib.Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("write", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))])
def test_nothing_runs_while_a_file_is_looked_into(tmp_path, write):
    """Nor is a way offered to load what would run a command."""
    write({"ema": STATE, "x": RunsCode(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"asks for .*system.* \(in 'x'\)") as info:
        load_pickle_safely(tmp_path / "evil.pt")
    assert "weights_only=False" not in str(info.value)
    assert "pickle.load" not in str(info.value)
    assert not (tmp_path / "ran").exists()


def test_plain_containers_are_read(tmp_path):
    content = {"a": collections.OrderedDict(STATE), "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.99))}
    torch.save(content, tmp_path / "run.pt")
    assert load_pickle_safely(tmp_path / "run.pt")["args"].betas == (0.9, 0.99)
