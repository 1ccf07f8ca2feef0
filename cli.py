"""What every command shares: how it fails, and on which device in which precision it runs."""

import argparse
import contextlib
import ctypes
import importlib
import math
import os
import platform
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import torch

from lifeline import RUN_ID

PRECISIONS = ("fp32", "tf32", "bf16")


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call a command; what its user got wrong (ValueError, OSError) ends in one line and exit status 2.

    Set HARMONICA_TRACEBACK=1 to see where such an error was raised.
    """
    keep_freed_memory()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        with orderly_end():
            main(args)
    except (ValueError, OSError) as error:
        if os.environ.get("HARMONICA_TRACEBACK"):
            raise
        if speaks_for_all() or isinstance(error, OSError) or getattr(error, "of_one_rank", False):
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if os.environ.get("HARMONICA_TRACEBACK") or error.name is None:
            raise
        if speaks_for_all():
            name = os.path.basename(sys.argv[0])
            print(f"{name}: error: {error}; install it: pip install -r requirements.txt", file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        print(f"{os.path.basename(sys.argv[0])}: error: {reason}; take a smaller batch size", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if speaks_for_all():
            print("interrupted", file=sys.stderr)
        sys.exit(130)


def speaks_for_all() -> bool:
    """Whether this process tells what all that torchrun started on a machine meet alike."""
    return RUN_ID not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that no half-written file stays.

    Not under torchrun, where a process may be waiting for another and would hear it late: it ends at once,
    and the next run clears up.
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
    """Let glibc keep what tensors leave: else it gives large blocks back and faults them in at every step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            mallopt(parameter, value)


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h

RANDOM_WEIGHTS = "RANDOM WEIGHTS: no checkpoint is loaded, the pictures are noise; only speed means anything"


def show_notes(args: argparse.Namespace) -> None:
    """Warn of flags that have no effect: those that `parse_args` put into `args.notes`, and a checkpoint."""
    notes = list(args.notes)
    if vars(args).get("random_weights") and args.ckpt:
        notes.append(f"--ckpt {args.ckpt} has no effect with --random-weights")
    for note in notes:
        warnings.warn(note, stacklevel=2)


def require(package: str, what: str, install: str | None = None) -> ModuleType:
    """Import a package before the work that needs it. Raises ValueError where it is not there.

    what: needs it, a flag or in words. install: what pip calls it, where it has another name.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{what} needs {package} ({error}); install it with `pip install {install or package}`"
            + (f" or leave {what} out" if what.startswith("--") else "")
        ) from None


def finite(text: str) -> float:
    """An argparse type: a number that is neither NaN nor infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def positive(text: str) -> float:
    """An argparse type: a finite number above 0, such as a learning rate."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def non_negative_int(text: str) -> int:
    """An argparse type: an integer of at least 0, such as a seed."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def threshold(text: str) -> float:
    """An argparse type: a score's threshold in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is outside [0, 1); the published one is 0.1")
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
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def add_model_arguments(parser: argparse.ArgumentParser, with_vae: bool = False) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="DiT-XL/2", help="DiT-XL/2 and its family, or DiT-digits/2")
    model.add_argument("--ckpt", help="checkpoint file or diffusers folder (default: the official one)")
    model.add_argument("--random-weights", action="store_true", help="no checkpoint: real speed, no meaning")
    model.add_argument("--image-size", type=positive_int, help="pixels (default 256)")
    model.add_argument("--num-classes", type=positive_int, help="default 1000")
    if with_vae:
        model.add_argument("--vae", help="ema, mse, none or a folder (default ema; pixel models have none)")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=PRECISIONS, help="default: tf32 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")


def set_precision(precision: str | None, device: torch.device) -> tuple[str, torch.dtype]:
    """Apply a precision to `device`; returns its name and the dtype of the model's weights.

    tf32: float32 weights, matrix products in TF32 (GPU only). bf16: bfloat16 weights; x_t and the sampler
    stay float32.
    """
    precision = precision or ("tf32" if device.type == "cuda" else "fp32")
    if precision == "tf32" and device.type != "cuda":
        warnings.warn("--precision tf32 has no effect on a CPU, fp32 is used", stacklevel=2)
        precision = "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision, torch.bfloat16 if precision == "bf16" else torch.float32


def hardware(device: torch.device) -> str:
    """What a figure was measured on: the GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        name = found[1]
    return f"{name}, {torch.get_num_threads()} threads"


def choose_device(name: str | None) -> torch.device:
    """The named device, or a GPU where there is one. Raises ValueError for a device that is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); use cpu or leave it out") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are made on the current one
    return device
