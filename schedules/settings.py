"""Which method with which values: from flags, from one word, or by hand."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common import cli
from schedules.table import CALIBRATED, METHODS, REUSES, Flag, flags_of, names, split_name


@dataclass(frozen=True)
class MethodSettings:
    """A value of `--accelerate-method` and the values of its flags, such as ("fora", {"interval": 2}).

    Flags that are not given have their defaults. Raises ValueError, naming what is wrong, for an unknown
    method, a flag that it does not read and one that it needs.
    """

    name: str = "none"
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reuse and self.base in METHODS and METHODS[self.base].dynamic:
            raise ValueError(
                f"--accelerate-method {self.name}: {self.reuse}- needs a static schedule, and {self.base} "
                f"decides while it samples; take {self.reuse}-fora, or {self.base} alone"
            )
        if self.name not in names():
            raise ValueError(
                f"--accelerate-method {self.name!r} is unknown; choose one of {', '.join(names())}"
            )
        flags = flags_of(self.name)
        if others := self.values.keys() - {flag.name for flag in flags}:
            raise ValueError(f"--accelerate-method {self.name} does not read {', '.join(sorted(others))}")
        given = {name: value for name, value in self.values.items() if value is not None}
        for flag in flags:
            if flag.needed and flag.name not in given and flag.instead not in given:
                raise ValueError(f"--accelerate-method {self.name} needs {flag.option}, {flag.needed}")
            if flag.instead in given and flag.name in given:
                other = next(one.option for one in flags if one.name == flag.instead)
                raise ValueError(f"{flag.option} and {other} exclude each other; give one")
        object.__setattr__(self, "values", {flag.name: flag.default for flag in flags} | given)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "MethodSettings":
        name = args.accelerate_method
        if "calibrate" in getattr(args, "given", ()) and f"{CALIBRATED}-{name}" in names():
            name = f"{CALIBRATED}-{name}"
        flags = flags_of(name) if name in names() else ()
        return cls(name, {flag.name: getattr(args, flag.name) for flag in flags})

    @classmethod
    def from_spec(cls, spec: str) -> "MethodSettings":
        """A method as one word: `none`, `fora:2`, `random:0.375`, `l2c:ROUTER`, or a router alone."""
        name, _, value = spec.partition(":")
        if name not in names():
            return cls("dynamiclayer", {"path": spec})
        first, *_ = (*flags_of(split_name(name)[1]), None)
        if bool(value) != bool(first):
            example = f"{name}:{first.name.upper()}" if first else name
            raise ValueError(f"method {spec!r} is not understood; write {example}")
        try:
            return cls(name, {first.name: first.type(value)} if first else {})
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"method {spec!r}: {error}") from None

    def calibrated(self, num_samples: int) -> "MethodSettings":
        """The same with weights of reuse that are solved on so many samples; as it is where it has others."""
        name = self.name if self.reuse else f"{CALIBRATED}-{self.name}"
        if name not in names() or not name.startswith(f"{CALIBRATED}-"):
            return self
        return MethodSettings(name, {**self.values, "calibrate": num_samples})

    @property
    def reuse(self) -> str:
        """How reused branches get their output: a key of `schedules.table.REUSES`, or ""."""
        return split_name(self.name)[0]

    @property
    def base(self) -> str:
        """The key of `schedules.table.METHODS`."""
        return split_name(self.name)[1]

    @property
    def dynamic(self) -> bool:
        """Whether its cache decides while it samples."""
        return METHODS[self.base].dynamic

    @property
    def caches(self) -> bool:
        """Whether it stores branch outputs."""
        return METHODS[self.base].schedule is not None

    def base_values(self) -> dict[str, Any]:
        """The values of the schedule's flags."""
        return self._values_of(METHODS[self.base].flags)

    def reuse_values(self) -> dict[str, Any]:
        """The values of the flags of its reuse."""
        return self._values_of(REUSES[self.reuse].flags) if self.reuse else {}

    def _values_of(self, flags: tuple[Flag, ...]) -> dict[str, Any]:
        return {flag.name: self.values[flag.name] for flag in flags}


def all_flags() -> dict[Flag, list[str]]:
    """Every flag of a method, with the values of `--accelerate-method` that read it."""
    readers: dict[Flag, list[str]] = {}
    for name, method in METHODS.items():
        for flag in method.flags:
            readers.setdefault(flag, []).append(name)
    for name, reuse in REUSES.items():
        for flag in reuse.flags:
            readers.setdefault(flag, []).append(f"{name}-*")
    return readers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("caching")
    group.add_argument("--accelerate-method", default="none", help=f"one of {', '.join(names())}")
    for flag, readers in all_flags().items():
        flag.add_to(group, f"{', '.join(readers)}: {flag.help}")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse an unknown method and a missing flag; note flags that the method does not read.

    args: as `cli.parse` returns them.
    """
    try:
        settings = MethodSettings.from_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    unread = {flag.name for flag in all_flags()} - settings.values.keys()
    unread |= set() if settings.caches else {"cache_dtype"}  # nothing is stored
    table = [cli.Unread(unread, lambda _: True, "with --accelerate-method {accelerate_method}")]
    cli.note_unread(parser, args, table)
