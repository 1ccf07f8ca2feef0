"""Reading and writing files: never half of one, never one that runs code, never two writers in one folder."""

import argparse
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
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import safetensors
import torch

from common import pickles
from common.contents import refuse_what_is_no_weights

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


def first_line(error: Exception) -> str:
    """The first line of an error's message that is not empty; else its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


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


# ---- reading pickles -------------------------------------------------------------------------------


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
