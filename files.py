"""Reading and writing files: never half of one, never one that runs code, never two writers in one folder."""

import argparse
import codecs
import contextlib
import errno
import json
import math
import os
import pickle
import re
import shutil
import socket
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import safetensors
import torch

import pickles

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- writing ---------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; takes its place at the end, and is removed on an error.

    It keeps the suffix, by which many writers choose their format, and gets the usual permissions. Its bytes
    are on the disk before it takes the place: neither a kill nor a power cut leaves half a file. Raises
    OSError in one line, whatever the writer raised, where the disk is full, a quota is met or a write fails.
    """
    path = Path(path)
    make_folder(path.parent)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        with _naming_what_fails(path, partial):
            yield partial
            umask = os.umask(0)
            os.umask(umask)
            partial.chmod(0o666 & ~umask)  # some writers make files that only their owner may read
            _to_disk(partial)
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove what `replacing` left in a folder when it was killed. Its only writer may call this."""
    for path in folder.iterdir():
        if re.fullmatch(r".+\.\d+\.part(\..*)?", path.name):
            path.unlink(missing_ok=True)


def append_line(path: Path, text: str) -> None:
    """One more line at the end of a text file; not half of one where the disk is full."""
    with _naming_what_fails(path, path):
        before = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.write(text + "\n")
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise


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


def read_json(path: str | Path) -> dict:
    """The object that `write_json` wrote. Raises ValueError in one line where it does not read."""
    try:
        value = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (it holds no object but a {type(value).__name__})")
    return value


def make_folder(path: Path) -> None:
    """Make a folder with those above it. Raises OSError in one line that says what is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        for one in (path, *path.parents):
            if one.is_symlink() and not one.exists():
                reason = f"{one} is a link to nothing"
            elif one.exists() and not one.is_dir():
                reason = f"{one} is a file"
        raise OSError(f"folder {path} cannot be made ({reason}); give another folder") from error


def check_writable(path: Path, suffixes: list[str]) -> None:
    """Refuse before the first step what could not be written after the last."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{path} cannot be written: {path.suffix or 'no suffix'} is not of {' '.join(suffixes)}"
        )
    make_folder(path.parent)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written; give a file in a writable folder")


@contextmanager
def _naming_what_fails(path: Path, partial: Path) -> Iterator[None]:
    """Every writer's way of saying that a write failed, as one OSError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if not _is_failed_write(error, partial):
            raise
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        if getattr(error, "errno", None) is None:  # some writers forget it
            with contextlib.suppress(OSError):
                reason += f"; {shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free there"
        raise OSError(
            f"{path} cannot be written ({reason}); make space or write elsewhere; what was there is unchanged"
        ) from error


def _is_failed_write(error: Exception, partial: Path) -> bool:
    if isinstance(error, OSError):  # but not one about another file, which the writer may have read
        return error.filename is None or Path(os.fsdecode(error.filename)) == partial
    if isinstance(error, RuntimeError):  # torch.save
        return any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "iostream"))
    return True


def _to_disk(path: Path) -> None:
    """Wait until a file's bytes are on the disk; some file systems say only now that they are full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # it cannot be asked to
            raise
    finally:
        os.close(descriptor)


# ---- one writer at a time --------------------------------------------------------------------------

LOCK = ".lock"
PATIENCE_S = 5.0  # for a writer that was killed just now and is still giving back its memory
_held: set[Path] = set()  # by this process; a second lock of its own would be granted
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def writing(folder: Path) -> Iterator[list[str]]:
    """Be the only process that writes in a folder, on any machine that shares it.

    The lock goes with its process, however that ends; children do not hold it. Yields what there is to say.
    Raises OSError, naming the holder, where another process has it.
    """
    path = folder.resolve() / LOCK
    if path in _held:
        raise BlockingIOError(f"{folder} is being written by this very process")
    descriptor, notes = _acquire(path, folder)
    _held.add(path)
    try:
        yield notes
    finally:
        _held.discard(path)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # before it is given back: whoever has it open will see that
        os.close(descriptor)


def _acquire(path: Path, folder: Path) -> tuple[int, list[str]]:
    """The open, locked file, and notes."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(f"{folder} is not writable ({error.strerror}); give another folder") from error
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no locks on this system")
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:
                note = f"note: {folder} cannot be locked ({error.strerror}); start no second command in it"
                return descriptor, [note]
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise BlockingIOError(
                    f"{folder} is being written by {holder or 'another process'}; wait for it or end it first"
                ) from None
            time.sleep(0.1)
            continue
        if _is_still_there(path, descriptor):
            who = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}"
            with contextlib.suppress(OSError):  # a full disk keeps nobody from going on
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{who}\n".encode(), 0)
            return descriptor, []
        os.close(descriptor)  # the last holder removed it in between


def _is_still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


# ---- what files hold -------------------------------------------------------------------------------

# How formats begin that a server or a proxy may send in place of weights, beside text.
_OTHER_FORMATS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "RAR",
    b"%PDF": "PDF",
}


def content_fault(path: Path, suffix: str | None = None, whole: bool = True) -> str | None:
    """Why a file cannot be the checkpoint or the config that its name promises, such as "is an HTML page".

    None where nothing speaks against it. Reads the head and the tail alone, so it is quick for any size; what
    it is for is what downloads leave: pages of a server or a proxy, Git LFS pointers, files that were cut.
    suffix: that of the name, where `path` is still a temporary one. whole=False: more is to come.
    """
    suffix, size = (suffix or path.suffix).lower(), path.stat().st_size
    if not size:
        return "is empty"
    with open(path, "rb") as file:
        head = file.read(4096)
    if not any(head):
        return f"begins with {len(head)} zero bytes"
    if suffix == ".json":
        return _json_fault(path, head) if whole else None
    if (kind := _text_kind(head)) is not None:
        return f"is {kind}"
    for magic, name in _OTHER_FORMATS.items():
        if head.startswith(magic):
            return f"is a {name} file"
    if not whole:
        return None
    if suffix == ".safetensors":
        return _safetensors_fault(path, size)
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):  # the directory is at its end
        return "is cut short"
    return None


def _text_kind(head: bytes) -> str | None:
    """What kind of text a file begins with, in any encoding; None for binary content."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        head = head.decode("utf-16", "ignore").encode()
    if any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head):
        return None
    text = head.decode(errors="replace").lstrip("\ufeff \t\r\n")
    if text.lower().startswith("<!doctype html") or "<html" in text.lower():
        return "an HTML page"
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer, not the file that it stands for"
    return f"text ({text.partition(chr(10))[0][:60].strip()!r})"


def _json_fault(path: Path, head: bytes) -> str | None:
    try:
        value = json.loads(path.read_bytes())
    except ValueError:  # a UnicodeDecodeError is one
        value = None
    if not isinstance(value, dict):
        return f"is {_text_kind(head) or 'binary'}, no JSON object"
    return f"holds an error message ({str(value['error'])[:60]!r})" if "error" in value else None


def _safetensors_fault(path: Path, size: int) -> str | None:
    """The format: the header's length in 8 bytes, the header in JSON, the tensors' bytes."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            return "is no safetensors file, or cut short in its header"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "is no safetensors file"
    return None if size == whole else f"has {size} bytes, its header says {whole}"


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
    if fault := content_fault(file, suffix="."):
        raise ValueError(f"{file} {fault}; it holds no weights: fetch or copy the file again")


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
