"""Which classes and functions a pickle asks for, without running any of it, and how to save it without them.

A stub stands for every class and function that the pickle names, so unpickling builds a picture of its
content and calls nothing.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # begins torch files of the time before zip archives
_PLAIN = (
    "list",
    "dict",
    "set",
    "frozenset",
    "tuple",
    "int",
    "float",
    "complex",
    "bool",
    "str",
    "bytes",
    "object",
)
_READ = {"argparse.Namespace", "_codecs.encode", *(f"builtins.{name}" for name in _PLAIN)}
_RUNS_CODE = ("builtins.", "os.", "posix.", "nt.", "subprocess.", "sys.", "runpy.", "socket.", "shutil.")
_ENUM = "builtins.getattr"  # Python 3.11.0 to 3.11.3 pickles a member of an enum as an attribute of its class
_SHOWN, _MOST_KEYS = 3, 8


class _Stub:
    """Stands for an object of a pickle; `parts` and `items` hold what it is made of."""

    asked = ""  # module.name of what it stands for

    def __new__(cls, *args, **kwargs):
        stub = super().__new__(cls)
        stub.parts, stub.items = [*args, *kwargs.values()], {}
        return stub

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.parts.append(state)

    def __setitem__(self, key, value):
        self.items[key] = value

    def __call__(self, *args, **kwargs):
        self.parts += [*args, *kwargs.values()]
        return self

    def append(self, value):
        self.parts.append(value)

    def extend(self, values):
        self.parts += values

    add = append

    @property
    def is_module(self) -> bool:
        """Whether it stands for a whole `torch.nn.Module`."""
        return any(isinstance(part, dict) and "_parameters" in part for part in self.parts)


class _Mapping(dict):
    """Stands for an OrderedDict."""


class _Picture(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        asked = _today(f"{module}.{name}")
        if asked == "collections.OrderedDict":
            return _Mapping
        return type("_Stub", (_Stub,), {"asked": asked})

    def persistent_load(self, pid):
        is_class = isinstance(pid, tuple) and pid[:1] == ("module",)  # else a tensor's storage
        return pid[1] if is_class else _Stub()


def refusal(file: Path, asked: str | None) -> str:
    """One line on a file that torch refused: what it asks for, where, and how to save it without.

    asked: the first thing that torch would not load, None where it does not tell.
    """
    why = "only tensors and plain values are read"
    try:
        content, load = _picture(file)
    except Exception:  # damaged too, or made to be
        what = f"it asks for {asked}; {why}" if asked else "it is damaged or asks to run code"
        return f"{file} was refused: {what}"
    unsafe = {_today(name) for name in (*_unsafe_globals(file), asked or "")}
    found = dict(_asking(content, unsafe, complete=zipfile.is_zipfile(file)))
    asks = {name for names in found.values() for name in names}
    if not asks and load.startswith("pickle"):
        return (
            f"{file} was refused: it is no torch file but a bare pickle. If you trust it, save it anew, "
            f"in Python: import pickle, torch; torch.save({load}, 'clean.pt')"
        )
    paths = [f"{path!r}" for path in found if path]
    where = f" (in {_some(paths)})" if paths else ""
    first = [_today(asked)] if asked else []
    named = _some([*first, *sorted(asks - set(first))]) or "what torch does not read"
    return f"{file} was refused: it asks for {named}{where}; {why}{_way_out(content, load, found)}"


def _today(name: str) -> str:
    """The name of a global as Python 3 has it, and as unpickling gives it."""
    module, dot, rest = name.partition(".")
    return _RENAMED.get(module, module) + dot + rest


_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _way_out(content, load: str, found: dict[str, set[str]]) -> str:
    """The line of Python by which somebody who trusts the file saves what can be read; "" without one."""
    asked = {name for names in found.values() for name in names} - _READ - {_ENUM}
    if any(name.startswith(_RUNS_CODE) for name in asked):
        return ""
    if isinstance(content, _Stub) and (content.is_module or content.items):
        kept = "c.state_dict()" if content.is_module else "dict(c)"
    elif isinstance(content, dict) and "" not in found:
        refused = {key for key in content if str(key) in {path.partition(".")[0] for path in found}}
        own = {key: content[key] for key in refused if isinstance(content[key], _Stub)}
        made = [f"{key!r}: c[{key!r}].state_dict()" for key, value in own.items() if value.is_module]
        made += [f"{key!r}: dict(c[{key!r}])" for key, value in own.items() if value.items]
        others = [key for key in content if key not in refused]
        kept = " | ".join(
            ([_comprehension([*refused], others)] if others else [])
            + ([f"{{{', '.join(made)}}}"] if made else [])
        )
    else:
        kept = ""
    if not kept:
        return ""
    modules = "pickle, torch" if load.startswith("pickle") else "torch"
    return (
        f". If you trust it, save it without, in Python: import {modules}; c = {load}; "
        f"torch.save({kept}, 'clean.pt')"
    )


def _comprehension(refused: list, kept: list) -> str:
    """The entries of a dict `c` but for some, told by whichever list of keys is the shorter."""
    if len(refused) <= min(len(kept), _MOST_KEYS):
        return f"{{k: v for k, v in c.items() if k not in {refused}}}"
    if len(kept) <= _MOST_KEYS:
        return f"{{k: c[k] for k in {kept}}}"
    return "{k: v for k, v in c.items() if isinstance(v, torch.Tensor)}"


def _picture(file: Path) -> tuple[object, str]:
    """A file's content, stubs in it for all that is no plain value, and the Python that would load it."""
    load = f"torch.load({str(file)!r}, weights_only=False)"
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            return _Picture(io.BytesIO(archive.read(name))).load(), load
    with open(file, "rb") as stream:
        content = _Picture(stream).load()
        if content != _LEGACY_MAGIC:
            return content, f"pickle.load(open({str(file)!r}, 'rb'))"
        *_, content = (_Picture(stream).load() for _ in range(3))  # after the version and the system
        return content, load


def _unsafe_globals(file: Path) -> set[str]:
    """What torch itself would not load; empty for files that are no zip archives, of which it cannot tell."""
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:
        return set()


def _asking(content, unsafe: set[str], complete: bool) -> Iterator[tuple[str, set[str]]]:
    """Paths such as `args.folder`, two keys deep at most, and what is asked for in or below them.

    unsafe: what torch refuses; where the list is not complete, all counts but what is sure to be read.
    """

    def asks(names: Iterator[str]) -> set[str]:
        plain = (name for name in names if name and (complete or not name.startswith("torch.")))
        return {name for name in plain if name in unsafe or not (complete or name in _READ)}

    if not isinstance(content, dict):
        yield "", asks(_names(content))
        return
    for path, value in _entries(content, depth=2):
        if found := asks(_names(value)):
            yield path, found


def _entries(content, depth: int) -> Iterator[tuple[str, object]]:
    """The entries of a dict or namespace under their dotted names; those of its own such entries too."""
    mappings = [content] if isinstance(content, dict) else content.parts
    for mapping in mappings:
        for key, value in mapping.items():
            is_open = isinstance(value, dict) or getattr(value, "asked", "") == "argparse.Namespace"
            if is_open and depth > 1:
                yield from ((f"{key}.{name}", one) for name, one in _entries(value, depth - 1))
            else:
                yield str(key), value


def _names(content) -> Iterator[str]:
    """Everything that is asked for in and below a value."""
    stack, seen = [content], set()
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, type) and issubclass(value, _Stub):
            yield value.asked
        elif isinstance(value, _Stub):
            yield value.asked
            stack += [*value.parts, *value.items, *value.items.values()]
        elif isinstance(value, dict):
            stack += [*value, *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            stack += value
