"""Files that are not what their names promise: error pages, Git LFS pointers, files that were cut."""

import codecs
import json
import zipfile
from pathlib import Path

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

    None where nothing speaks against it. It reads only the head and the tail, so it is quick for any size. It
    finds what downloads leave behind: pages of a server or a proxy, Git LFS pointers, files that were cut.
    suffix: the suffix of the final name, where `path` is a temporary one. whole: False while the download
    goes on.
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
    """The kind of text that a file begins with, in any encoding; None for binary content."""
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
        raise ValueError(f"{file} was refused: it {fault}; fetch or copy the file again, it holds no weights")
