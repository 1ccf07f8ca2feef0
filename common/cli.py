"""Command lines: how a command ends, which values its flags take, which flags had no effect."""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from types import ModuleType
from typing import NamedTuple

import torch

from common.lifeline import RUN_ID


class OneProcessError(ValueError):
    """An error that one process alone can meet, such as a bad sample: it is told whatever the rank."""

    of_one_rank = True


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call a command. A ValueError or OSError, a mistake of its user, ends in one line and exit status 2.

    Set HARMONICA_TRACEBACK=1 to see where such an error was raised.
    """
    if getattr(args, "local_rank", None) is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    keep_freed_memory()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    command = os.path.basename(sys.argv[0])
    try:
        with orderly_end():
            main(args)
    except (ValueError, OSError) as error:
        if os.environ.get("HARMONICA_TRACEBACK"):
            raise
        if speaks_for_all() or isinstance(error, OSError) or getattr(error, "of_one_rank", False):
            print(f"{command}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if os.environ.get("HARMONICA_TRACEBACK") or error.name is None:
            raise
        if speaks_for_all():
            print(f"{command}: error: {error}; pip install -r requirements.txt installs it", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if (reason := _explained(error)) is None:
            raise
        print(f"{command}: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if speaks_for_all():
            print("interrupted", file=sys.stderr)
        sys.exit(130)


def _explained(error: Exception) -> str | None:
    """One line for an error that torch raises deep inside; None for a fault of the program."""
    message = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"error: {message.partition('. ')[0]}; take a smaller batch size or model"
    if isinstance(error, MemoryError) or _NO_MEMORY in message:
        return "error: out of memory; take a smaller batch size or model"
    return None


_NO_MEMORY = "can't allocate memory"  # torch's words where RAM is too small


def speaks_for_all() -> bool:
    """Whether this process prints errors that all processes of this machine meet alike."""
    return RUN_ID not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that no half-written file stays.

    Under torchrun a process may wait for another one and would react late. There it ends at once, and the
    next run clears up.
    """
    if RUN_ID in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: else it returns large blocks and page-faults them in at every step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            mallopt(parameter, value)


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from malloc.h

RANDOM_WEIGHTS = "RANDOM WEIGHTS: no checkpoint is loaded, the pictures are noise; only speed means anything"


class Unread(NamedTuple):
    """Flags that a command accepts but does not read when `when` holds.

    reason: ends the sentence "--flag has no effect ...", such as "with --method {method}"; its braces are
    filled with the flags' values.
    """

    names: Iterable[str]
    when: Callable[[argparse.Namespace], bool]
    reason: str


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """The result of `parser.parse_args`, with the names of the flags that were given in `args.given`.

    A flag that was given its default value counts as given. `args.notes` and `args.unread` are empty;
    `note_unread` fills them.
    """
    args, absent = parser.parse_args(arguments), object()
    given = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(vars(args), absent)))
    args.given = {name for name, value in vars(given).items() if value is not absent}
    args.notes, args.unread = [], set()
    return args


def note_unread(parser: argparse.ArgumentParser, args: argparse.Namespace, table: Iterable[Unread]) -> None:
    """Put the flags that have no effect under the others into `args.unread`, and note those that were given.

    All of them are set back to their defaults. The table is read from top to bottom: a flag that decides
    about others stands above them. A command may call this several times, with one table each time.
    """
    for names, when, reason in table:
        for name in sorted(set(names) & vars(args).keys() - args.unread):
            if when(args):
                args.unread.add(name)
                if name in args.given:
                    flag = name.replace("_", "-")
                    args.notes.append(f"--{flag} has no effect {reason.format_map(vars(args))}")
                setattr(args, name, parser.get_default(name))


def show_notes(args: argparse.Namespace) -> None:
    """Warn of flags that have no effect."""
    for note in args.notes:
        warnings.warn(note, stacklevel=2)


def require(package: str, what: str, install: str | None = None) -> ModuleType:
    """Import a package before the work that needs it. Raises ValueError where it is missing.

    what: a flag that needs it, or words for it. install: its name for pip, where that is another.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{what} needs {package} ({error}); install it with `pip install {install or package}`"
            + (f" or leave {what} out" if what.startswith("--") else "")
        ) from None


LARGEST_FLOAT = torch.finfo(torch.float32).max
LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**64 - 1  # the largest that torch's generators take


def finite(text: str) -> float:
    """An argparse type: a number that is neither NaN nor infinite, in float32 either."""
    value = float(text)
    if not abs(value) <= LARGEST_FLOAT:
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def positive(text: str) -> float:
    """An argparse type: a finite number above 0, such as a learning rate."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def non_negative(text: str, fault: str = "is no weight") -> float:
    """An argparse type: a finite number of at least 0, such as a weight. fault: said of any other."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} {fault}; give 0 or more")
    return value


def tolerance(text: str) -> float:
    """An argparse type: a finite number of at least 0 that a change is compared with."""
    return non_negative(text, "is negative")


def non_negative_int(text: str) -> int:
    """An argparse type: a count, 0 included."""
    return _int_within(text, 0, LARGEST_COUNT)


def seed(text: str) -> int:
    """An argparse type: a seed of 64 bits."""
    return _int_within(text, 0, LARGEST_SEED)


def _int_within(text: str, least: int, most: int) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is " + (f"not at least {least}" if least else "negative"))
    if value > most:
        raise argparse.ArgumentTypeError(f"{text} is too large; give {most} or less")
    return value


def threshold(text: str) -> float:
    """An argparse type: a score's threshold in [0, 1)."""
    return below_one(text, "; the published one is 0.1")


def below_one(text: str, hint: str = "") -> float:
    """An argparse type: a number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is outside [0, 1){hint}")
    return value


def interval(text: str) -> Fraction:
    """An argparse type: FORA's interval, such as 2, 1.5 or 4/3."""
    try:
        value = Fraction(text)
    except ZeroDivisionError:
        value = Fraction(0)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1; 1 computes every step, 2 every other")
    return value


def positive_int(text: str) -> int:
    """An argparse type: a count of at least 1."""
    return _int_within(text, 1, LARGEST_COUNT)


def settings_from(cls, args: argparse.Namespace):
    """A dataclass of settings from the flags of the same names. A field without a flag keeps its default."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: getattr(args, name) for name in names if hasattr(args, name)})
