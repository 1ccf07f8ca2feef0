"""Files of weights from any program: found in a folder, read by their content, checked.

A folder may be one of diffusers or accelerate (whole files, shards under an index, a variant such as fp16), a
pipeline, or the root of a model in the Hub's cache. Nothing in a file is executed.
"""

import json
import math
import re
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.contents import is_pickle, is_safetensors, refuse_what_is_no_weights
from common.files import load_pickle_safely

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("ema", "fp32", "bf16", "fp16")  # the best first, where the folder has no plain files
_FORMATS = ("safetensors", "bin")
# Parts of names that DistributedDataParallel, torch.compile, FSDP and activation checkpointing add.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")


def read_config(path: Path) -> dict:
    """The object in a config.json of diffusers. Raises ValueError, naming the file, where there is none."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no config of diffusers ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no config of diffusers but a {type(values).__name__}; fetch it again")
    return values


def folder_of(path: Path, part: str) -> Path:
    """The folder that `path` means: itself, its snapshot in the Hub's cache, or a pipeline's `part` in it.

    A cache of one model counts as that model. Raises ValueError where a cached model has several snapshots
    and none is the main one.
    """
    cached = [folder for folder in path.glob("models--*") if (folder / "snapshots").is_dir()]
    path = cached[0] if len(cached) == 1 else path
    snapshots = path if path.name == "snapshots" else path / "snapshots"
    if snapshots.is_dir():
        found = sorted(folder for folder in snapshots.iterdir() if folder.is_dir())
        reference = snapshots.parent / "refs" / "main"
        main = snapshots / reference.read_text().strip() if reference.is_file() else None
        if main not in found and len(found) != 1:
            raise ValueError(
                f"{snapshots} holds {len(found)} snapshots, refs/main names none of them; give one's folder"
            )
        path = main if main in found else found[0]
    has_own_config = (path / "config.json").is_file()
    return path / part if (path / part).is_dir() and not has_own_config else path


def find_weights(folder: Path) -> Path:
    """The file of weights in a folder, or the index of its shards. FileNotFoundError says what is there."""
    names = sorted(path.name for path in folder.iterdir())
    for stem in _STEMS:
        variants: dict[str, list[tuple[int, bool, str]]] = {}  # the best format first, whole before shards
        for name in (name for name in names if (folder / name).is_file()):
            for order, suffix in enumerate(_FORMATS):
                whole = re.fullmatch(rf"{stem}(?:\.(\w+))?\.{suffix}", name)
                index = re.fullmatch(rf"{stem}\.{suffix}\.index(?:\.(\w+))?\.json", name)
                if match := whole or index:
                    variants.setdefault(match[1] or "", []).append((order, index is not None, name))
        known = [variant for variant in ("", *_VARIANTS) if variant in variants]
        if not known and len(variants) > 1:
            raise ValueError(f"folder {folder} has weights of {', '.join(variants)}; give one of the files")
        if variants:
            return folder / min(variants[known[0] if known else next(iter(variants))])[-1]
    expected = ", ".join(f"{stem}.{suffix}" for stem in _STEMS for suffix in _FORMATS)
    raise FileNotFoundError(f"folder {folder} holds none of {expected}; {_instead(folder, names)}")


def _instead(folder: Path, names: list[str]) -> str:
    """A remedy for a folder without weights, which depends on its files."""
    dangling = [name for name in names if (folder / name).is_symlink() and not (folder / name).exists()]
    if dangling:
        return f"its {dangling[0]} is a link to what is not there: fetch the files again"
    if ".metadata" in names:
        return (
            "it is a distributed checkpoint: bring it into one file with `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} checkpoint.pt`"
        )
    if shards := [name for name in names if _SHARD.search(name)]:
        return f"it has shards such as {shards[0]} but not their index (*.index.json): fetch it too"
    files = [name for name in names if name.endswith((".pt", ".pth", ".ckpt", ".bin", ".safetensors"))]
    if files:
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        return f"it has {', '.join(files[:3])}{more}: give a file"
    if "config.json" in names:
        return "it has a config.json without the weights: fetch them too"
    if cached := [name for name in names if name.startswith("models--")]:
        return f"it is a cache of the Hub with {', '.join(cached[:3])}: give such a folder"
    return "give the checkpoint file"


def read_weights(file: Path):
    """The content of a file of weights, whatever its name; for an index, of all its shards.

    Raises FileNotFoundError or ValueError in one line, naming the file that is at fault.
    """
    if re.search(r"\.index(\.\w+)?\.json$", file.name):
        return _read_shards(file)
    if _SHARD.search(file.name):
        raise ValueError(f"{file} is one of several shards; give their folder or their *.index.json")
    return _read_one(file)


def _read_one(file: Path):
    if not is_safetensors(file) and (is_pickle(file) or file.suffix != ".safetensors"):
        return load_pickle_safely(file)
    refuse_what_is_no_weights(file)
    try:
        return load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is no safetensors file or only a part of one ({error}); fetch or copy it again"
        ) from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards ({error!r}); fetch it again") from None
    state: dict[str, Tensor] = {}
    for shard in shards:
        file = index.parent / shard
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist, one of the {len(shards)} shards of {index.name}; fetch it too"
            )
        content = _read_one(file)
        wanted = {name for name, place in places.items() if place == shard}
        if not isinstance(content, dict) or content.keys() != wanted:
            differing = sorted(wanted ^ set(content), key=str)[:3] if isinstance(content, dict) else "all"
            raise ValueError(f"{file} does not hold what {index.name} says ({differing}); fetch both again")
        state |= content
    return state


def unwrapped(state: dict[str, object]) -> tuple[dict[str, object], list[str]]:
    """Names without the parts that wrappers add, and these parts; unchanged where two names would meet."""
    names = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in state}
    if len(set(names.values())) < len(names):
        return state, []
    removed = sorted({part for name in names if names[name] != name for part in name.split(".")} & _WRAPPERS)
    return {names[name]: value for name, value in state.items()}, removed


def check_values(state: dict[str, Tensor], file: Path) -> None:
    """Raise ValueError for the first tensor that is no weight: not floating point, not finite, or empty."""
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: {name} is no tensor but a {type(tensor).__name__}; save it as one")
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype not in DTYPES or tensor.is_quantized:
            raise ValueError(
                f"{file}: {name} is {kind}, not {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}; "
                "save the weights in one of these (quantised ones multiplied by their scales)"
            )
        if tensor.layout != torch.strided or tensor.is_meta:
            what = "holds no data (device meta)" if tensor.is_meta else f"has layout {tensor.layout}"
            raise ValueError(f"{file}: {name} {what}; save the weights as plain tensors")
        if tensor.numel() and not _all_finite(tensor):
            bad = int((~tensor.float().isfinite()).sum())
            raise ValueError(
                f"{file}: {name} has {bad} of {tensor.numel()} values that are not finite (NaN, infinite or "
                "beyond float32); a training that diverged or a damaged file: take another checkpoint"
            )


def _all_finite(tensor: Tensor) -> bool:
    """In float32, in one pass without a copy."""
    least, greatest = (value.item() for value in tensor.detach().aminmax())
    return math.isfinite(least - greatest) and max(-least, greatest) <= torch.finfo(torch.float32).max
