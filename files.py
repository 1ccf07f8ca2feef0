"""Reading and writing files: never half of one, never one that runs code."""

import argparse
import json
import math
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


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
    """`value` as indented JSON, in place of what is there. Raises ValueError for NaN and infinity."""
    text = to_json(value, indent=1) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text)


def to_json(value: object, indent: int | None = None) -> str:
    """`json.dumps` that raises ValueError for NaN and infinity, naming where they are: JSON has neither."""
    for place, number in _floats(value, ""):
        if not math.isfinite(number):
            raise ValueError(f"{place or 'the value'} is {number}; only finite numbers are written")
    return json.dumps(value, indent=indent, allow_nan=False)


def _floats(value: object, place: str) -> Iterator[tuple[str, float]]:
    """Every float in a JSON value with its place, such as `rows.3.fid`."""
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, dict | list | tuple):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _floats(one, f"{place}.{key}" if place else str(key))


def check_writable(path: Path, suffixes: list[str]) -> None:
    """Refuse before the first step what could not be written after the last."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{path} cannot be written: {path.suffix or 'no suffix'} is not of {' '.join(suffixes)}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written; give a file in a writable folder")


def load_pickle_safely(file: Path):
    """`torch.load` that reads tensors, plain containers and an argparse.Namespace, and refuses all else.

    Raises ValueError in one line, whatever is wrong with the file's content.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {found[1]}" if found else "it is damaged or asks to run code"
        raise ValueError(f"{file} was refused: {what}; only tensors and plain values are read") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} cannot be read as a torch file ({reason})") from None
