"""Arrays from .npz and .npy files, their names, types and shapes known before any value is read."""

import lzma
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

# The errors of zipfile and numpy for damaged files; RuntimeError is for encrypted ones.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError)
KINDS = {
    "f": "real floating-point numbers",
    "iu": "integers",
    "fiu": "real numbers",
    "u": "unsigned integers",
}


@dataclass(frozen=True)
class Header:
    """Type and shape of an array in a file. fortran_order: the first index moves fastest."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class ArrayFile:
    """The arrays of an .npz by their names, or the one of an .npy as `arr_0`; told by content.

    Raises FileNotFoundError, or ValueError for what is neither or is damaged. Messages begin with `label`, by
    default the path.
    """

    def __init__(self, path: str | Path, label: str | None = None):
        self.path, self.label = Path(path), label or str(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.label} does not exist; give an .npz")
        self.is_npz = zipfile.is_zipfile(self.path)
        if self.is_npz:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.namelist()
            self.names = sorted(name.removesuffix(".npy") for name in members if name.endswith(".npy"))
        else:
            with open(self.path, "rb") as file:
                if file.read(6) != b"\x93NUMPY":
                    raise ValueError(f"{self.label} cannot be read: it is no .npz, or ends early")
            self.names = ["arr_0"]
        self._headers: dict[str, Header] = {}

    @property
    def contents(self) -> str:
        """The names, for messages."""
        return ", ".join(self.names) or "no arrays"

    def place(self, name: str) -> str:
        """How messages call an array."""
        return f"{self.label}: {name}" if self.is_npz else self.label

    def header(self, name: str) -> Header:
        """Type and shape of an array, whose values the file holds in full. Raises ValueError otherwise."""
        if name not in self._headers:
            with self._open(name) as (stream, size):
                header = _read_header(stream)
                wanted = stream.tell() + math.prod(header.shape) * header.dtype.itemsize
                if size != wanted and not header.dtype.hasobject:
                    raise ValueError(f"{size} bytes where its shape {header.shape} needs {wanted}")
            self._headers[name] = header
        return self._headers[name]

    def read(self, name: str, kinds: str, axes: str | None = None) -> np.ndarray:
        """An array in C order and native bytes.

        kinds: those of its dtype, a key of KINDS. axes: names of its axes, such as "(n, C, H, W)", or any.
        Raises ValueError, before the values are read, for another dtype or number of axes.
        """
        header = self.header(name)
        fits = axes is None or len(header.shape) == len(axes.replace(",)", ")").split(","))
        if header.dtype.kind not in kinds or not fits:
            wanted = f"{KINDS[kinds]} {axes or ''}".rstrip()
            raise ValueError(f"{self.place(name)} is {header}; {wanted} are needed")
        with self._open(name) as (stream, _):
            array = np.lib.format.read_array(stream, allow_pickle=False)
        return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))

    def chunks(self, name: str, items: int) -> Iterator[bytes]:
        """The bytes of an array in C order, `items` of its first axis at a time."""
        header = self.header(name)
        size = math.prod(header.shape[1:]) * header.dtype.itemsize
        with self._open(name) as (stream, _):
            _read_header(stream)
            for first in range(0, header.shape[0], items):
                wanted = min(items, header.shape[0] - first) * size
                if len(data := stream.read(wanted)) != wanted:
                    raise EOFError("it ends early")
                yield data

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        """A stream at an array's header, and its size in bytes. Damage met in it becomes a ValueError."""
        try:
            if self.is_npz:
                with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
                    yield stream, archive.getinfo(f"{name}.npy").file_size
            else:
                with open(self.path, "rb") as stream:
                    yield stream, self.path.stat().st_size
        except DAMAGE as error:
            raise ValueError(f"{self.place(name)} is damaged ({error}); make the file again") from None


def _read_header(stream: BinaryIO) -> Header:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(stream)
    return Header(shape, dtype, fortran_order)
