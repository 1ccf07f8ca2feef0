"""Reading and writing files: never half of one, never one that runs code."""

import argparse
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import pickles


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; takes its place at the end, and is removed on an error.

    It keeps the suffix, by which many writers choose their format, and gets the usual permissions.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # some writers make files that only their owner may read
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, value: object) -> None:
    """`value` as indented JSON, in place of what is there."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def check_writable(path: Path, suffixes: list[str]) -> None:
    """Refuse before the first step what could not be written after the last."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{path} cannot be written: {path.suffix or 'no suffix'} is not of {' '.join(suffixes)}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written; give a file in a writable folder")


def is_safetensors(file: Path) -> bool:
    """Whether a file is safetensors by its content, whatever its name: the length of a header, then JSON."""
    with open(file, "rb") as stream:
        head = stream.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**30


def is_pickle(file: Path) -> bool:
    """Whether a file is a torch file or a pickle by its content: a zip archive, or protocol 2 and later."""
    with open(file, "rb") as stream:
        head = stream.read(4)
    return head == b"PK\x03\x04" or head[:1] == b"\x80"


def refuse_what_is_no_weights(file: Path) -> None:
    """Raise ValueError for what may lie in place of weights: nothing, zeros, a web page, an LFS pointer."""
    with open(file, "rb") as stream:
        head = stream.read(512)
    start = head.lstrip()[:64].lower()
    if not head.strip(b"\0"):
        what = "is filled with zeros" if head else "is empty"
        raise ValueError(f"{file} {what}: a copy or download was cut short; fetch or copy it again")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{file} is a web page, not weights: a download kept an error page; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a Git LFS pointer, not weights; run `git lfs pull` in its repository")


def load_pickle_safely(file: Path):
    """`torch.load` that reads tensors, plain containers and an argparse.Namespace, and refuses all else.

    Raises ValueError in one line, whatever is wrong with the file's content; where it asks for something
    else, the line says which of its entries do and how to save it without them.
    """
    refuse_what_is_no_weights(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # it is read or refused
            with open(file, "rb") as stream:  # by a path torch would go by the suffix
                return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(pickles.refusal(file, found and found[1])) from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{file} cannot be read as a torch file ({reason}); it may be cut short: fetch or copy it again"
        ) from None
