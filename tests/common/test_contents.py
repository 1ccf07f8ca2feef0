"""Files that are not what their names promise."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from common.contents import content_fault, is_pickle, is_safetensors, refuse_what_is_no_weights

FAULTS = {
    "x.pt": {
        b"": "is empty",
        bytes(5000): "begins with 4096 zero bytes",
        b"<!DOCTYPE html><p>sign in": "is an HTML page",
        b"version https://git-lfs.github.com/spec/v1\n": "is a Git LFS pointer",
        b"Not Found\n": "is text ('Not Found')",
        b"\x1f\x8b\x08\x00": "is a gzip file",
        b"PK\x03\x04 and no directory": "is cut short",
    },
    "config.json": {
        b"[1]": "no JSON object",
        b'{"error": "no access"}': "holds an error message ('no access')",
        b"{": "no JSON object",
    },
    "x.safetensors": {
        b"\x10\0\0\0\0\0\0\0{": "is no safetensors file, or cut short in its header",
        b"\x08\0\0\0\0\0\0\0notajson": "is no safetensors file",
    },
}


@pytest.mark.parametrize(
    ("name", "content", "fault"), [(name, *pair) for name, ones in FAULTS.items() for pair in ones.items()]
)
def test_what_stands_in_for_a_file_is_told(tmp_path, name, content, fault):
    (tmp_path / name).write_bytes(content)
    assert fault in content_fault(tmp_path / name)


def test_whole_files_have_no_fault(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    torch.save({"x": torch.ones(3)}, tmp_path / "x.pt")
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    for path in tmp_path.iterdir():
        assert content_fault(path) is None
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-1])
    assert (
        content_fault(tmp_path / "x.safetensors")
        == f"has {len(whole) - 1} bytes, its header says {len(whole)}"
    )
    assert content_fault(tmp_path / "x.safetensors", whole=False) is None  # more may come


def test_formats_are_told_by_content(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "a.pt")
    torch.save({"x": 1}, tmp_path / "b.safetensors")
    (tmp_path / "c").write_bytes(pickle.dumps({"x": 1}))
    kinds = [(is_safetensors(path), is_pickle(path)) for path in sorted(tmp_path.iterdir())]
    assert kinds == [(True, False), (False, True), (False, True)]


def test_a_page_in_place_of_weights_is_refused_in_one_line(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"<html>")
    with pytest.raises(
        ValueError, match="x.pt was refused: it is an HTML page; fetch or copy the file again"
    ):
        refuse_what_is_no_weights(tmp_path / "x.pt")
