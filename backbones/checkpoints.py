"""Checkpoints of DiT: official files, training runs in any wrapper, diffusers' layout, all by official names.

The names in a file tell under which key and prefix its weights are (`ema`, `state_dict`, `module.`,
`_orig_mod.`, ...) and which model they belong to (depth, width, input size, label rows, learned variance). A
checkpoint of another model is refused with the flags that fit it. Nothing in a checkpoint is executed.
"""

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.weights import check_values, find_weights, folder_of, read_config, read_weights, unwrapped
from models import DiT, DiT_models

# Names that only a DiT has, in the official layout and in diffusers'.
_OFFICIAL = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
_DIFFUSERS = ("pos_embed.proj.weight", "transformer_blocks.0.norm1.linear.weight", "proj_out_2.weight")
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)", re.IGNORECASE)
_DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")


def load_checkpoint(model: DiT, path: str | Path) -> str:
    """Load weights strictly: every parameter of `model` and nothing else. Returns a line on what was loaded.

    path: a file (a bare state dict, or one under any of the usual keys and prefixes, of which an average such
    as `ema` is taken first), torch's or safetensors by content; or a folder of diffusers', an index of
    shards, a pipeline, a model in the Hub's cache. Every tensor must be floating point and finite. Raises
    FileNotFoundError or ValueError in one line.
    """
    file = _find_file(Path(path))
    content = read_weights(file)
    found = find_state(content, file)
    state, hints = found.state, _hints(content)
    if any(name.startswith("transformer_blocks.") for name in state):
        state, hints = from_diffusers(state, file), _diffusers_hints(file)
    state.setdefault("pos_embed", model.pos_embed.detach())  # fixed: diffusers and some exports leave it out
    _require_match(model, state, hints, file)
    check_values(state, file)
    model.load_state_dict(state)
    rows = len(model.y_embedder.embedding_table.weight)
    labels = f"{model.num_classes} classes {'and the' if model.has_null_label else 'without a'} null label"
    return f"{file}{found.words}; {rows} rows of labels: {labels}"


def _find_file(path: Path) -> Path:
    if path.is_dir():
        return find_weights(folder_of(path, "transformer"))
    if path.is_file():
        return path
    if path.is_symlink():
        raise FileNotFoundError(f"checkpoint {path} is a link to {path.readlink()}, which does not exist")
    raise FileNotFoundError(f"checkpoint {path} does not exist; download.py fetches the official ones")


# ---- what a file holds -----------------------------------------------------------------------------


class Found(NamedTuple):
    """A DiT's state dict in a file: under which key and prefix, and a few words on that."""

    state: dict[str, Tensor]
    path: tuple[str, ...] = ()
    prefix: str = ""
    words: str = ""

    @property
    def is_average(self) -> bool:
        return any(_AVERAGED.search(part) for part in (*self.path, self.prefix))

    @property
    def place(self) -> str:
        path, names = ".".join(self.path), f"names that begin with '{self.prefix}'"
        return ", ".join([f"'{path}'"] * bool(path) + [names] * bool(self.prefix)) or "the file's own names"


def find_state(content, file: Path | str = "checkpoint") -> Found:
    """The DiT in what a file holds. Raises ValueError where there is none, or no telling which of several."""
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no state dict but a {type(content).__name__}; give a DiT checkpoint")
    found = list(_states(content))
    averages = [one for one in found if one.is_average]
    chosen = averages or found
    if not chosen:
        keys = ", ".join(repr(key) for key in [*content][:5]) + (", ..." if len(content) > 5 else "")
        hint = "give a DiT checkpoint"
        if _has_nameless(content):
            hint = "'shadow_params' has no names: copy them into the model and save its state_dict()"
        raise ValueError(f"{file} holds no DiT: its entries are {keys or 'none'}; {hint}")
    if len(chosen) > 1:
        places = "; ".join(one.place for one in chosen[:4])
        raise ValueError(
            f"{file} holds {len(chosen)} DiT state dicts ({places}); save the one that is wanted alone"
        )
    [one] = chosen
    words = f", its {one.place}{one.words}" if one.path or one.prefix else one.words
    kinds = (dict, list, type(None))
    empty = [key for key, value in content.items() if isinstance(value, kinds) and _AVERAGED.search(str(key))]
    if empty and not averages:
        words += f"; no DiT is in its '{empty[0]}'"
    return one._replace(words=words)


def _states(value: dict, path: tuple[str, ...] = ()) -> Iterator[Found]:
    """Every DiT in nested dicts, the optimizers' left out."""
    named = {key: one for key, one in value.items() if isinstance(key, str)}
    state, removed = unwrapped(named)
    found = {
        name.removesuffix(anchor)
        for name in state
        for anchor in (*_OFFICIAL, *_DIFFUSERS)
        if name == anchor or name.endswith(f".{anchor}")
    }
    for prefix in sorted(found):
        others = tuple(one for one in found if one and one != prefix)
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix) and not (prefix == "" and others and name.startswith(others))
        }
        own.pop("n_averaged", None)  # a counter of torch.optim.swa_utils.AveragedModel
        words = f", {' and '.join(map(repr, removed))} taken out of the names" if removed else ""
        left = [name for name in state if not name.startswith(prefix)] if prefix else []
        if left:
            parts = sorted({name.partition(".")[0] for name in left})
            words += f"; not read: {len(left)} entries of {', '.join(parts[:3])}"
        yield Found(own, path, prefix, words)
    for key, one in named.items():
        if isinstance(one, dict) and len(path) < 4 and not key.lower().startswith("opt"):
            yield from _states(one, (*path, key))


def _has_nameless(content) -> bool:
    """Whether it holds an EMA of diffusers' `EMAModel`, a list of tensors without names."""
    return isinstance(content, dict) and any(
        key == "shadow_params" or _has_nameless(value) for key, value in content.items()
    )


class Hints(NamedTuple):
    """Facts that the weights do not tell, from what may stand beside them."""

    num_classes: int | None = None
    num_heads: int | None = None
    input_size: int | None = None


def _hints(content) -> Hints:
    """From a training run's arguments, which may stand beside its state dicts."""
    for key in ("args", "hyper_parameters", "config"):
        args = content.get(key) if isinstance(content, dict) else None
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        if isinstance(args, dict) and type(args.get("num_classes")) is int:
            return Hints(num_classes=args["num_classes"])
    return Hints()


def _diffusers_hints(file: Path) -> Hints:
    """From the config.json beside a file in diffusers' layout. Raises ValueError for another class."""
    path = file.parent / "config.json"
    if not path.is_file():
        return Hints()
    config = read_config(path)
    kind = config.get("_class_name", _DIFFUSERS_CLASSES[0])
    if kind not in _DIFFUSERS_CLASSES:
        raise ValueError(f"{path} is of a {kind}; this program samples a {_DIFFUSERS_CLASSES[0]} (DiT)")
    values = [config.get(name) for name in ("num_embeds_ada_norm", "num_attention_heads", "sample_size")]
    return Hints(*(value if type(value) is int else None for value in values))


# ---- of which model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """The shape of a model, from a state dict under official names. Fields that it does not tell are None."""

    depth: int
    hidden_size: int
    patch_size: int
    in_channels: int
    out_channels: int
    label_rows: int
    input_size: int | None
    mlp_size: int | None

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> "Architecture | None":
        blocks = [int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))]
        shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
        patches, labels, output = (shapes.get(name, ()) for name in _OFFICIAL)
        tokens, mlp = shapes.get("pos_embed", ()), shapes.get("blocks.0.mlp.fc1.weight", ())
        if not blocks or (len(patches), len(labels), len(output)) != (4, 2, 2):
            return None
        hidden_size, in_channels, patch_size, _ = patches
        side = math.isqrt(tokens[1]) if len(tokens) == 3 else 0
        is_square = side and side**2 == tokens[1]
        return cls(
            1 + max(blocks), hidden_size, patch_size, in_channels, output[0] // patch_size**2, labels[0],
            side * patch_size if is_square else None, mlp[0] if mlp else None,
        )  # fmt: skip

    @property
    def size(self) -> tuple[int, int, int]:
        return self.depth, self.hidden_size, self.patch_size


def _require_match(model: DiT, state: dict[str, Tensor], hints: Hints, file: Path) -> None:
    """Raise ValueError where a state dict is not the model's, saying whose it is and which flags fit it."""
    found, asked = Architecture.of(state), Architecture.of(model.state_dict())
    if found is not None and (differences := _differences(model, found, asked, hints)):
        raise ValueError(f"{file} is another model's: it has {'; '.join(differences)}")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    faults = [f"{name} is missing" for name in expected.keys() - shapes.keys()]
    faults += [f"{name} is unknown" for name in shapes.keys() - expected.keys()]
    shared = expected.keys() & shapes.keys()
    faults += [f"{n} is {shapes[n]}, not {expected[n]}" for n in shared if shapes[n] != expected[n]]
    if faults:
        shown = "; ".join(sorted(faults)[:3])
        raise ValueError(
            f"{file} does not fit this model ({len(faults)} differences: {shown}); "
            "check --model, --image-size and --num-classes"
        )


def _differences(model: DiT, found: Architecture, asked: Architecture, hints: Hints) -> list[str]:
    """The differences of a checkpoint from the model, each with the flag that fits."""
    faults = []
    if found.size != asked.size:
        presets = [name for name, preset in DiT_models.items() if _size_of(preset) == found.size]
        flag = f"--model {presets[0]}" if presets else "no --model has it"
        size = "depth {}, width {} and patch size {}".format(*found.size)
        faults.append(f"{size} ({flag}), not {asked.depth}, {asked.hidden_size} and {asked.patch_size}")
    if found.in_channels != asked.in_channels:
        faults.append(f"{found.in_channels} input channels, not {asked.in_channels}")
    input_size = found.input_size if hints.input_size is None else hints.input_size
    if input_size not in (None, asked.input_size):
        pixels, factor = input_size * model.vae_factor, model.vae_factor
        flag = f"--image-size {pixels}" + (f" with a VAE of factor {factor}" if factor > 1 else "")
        faults.append(f"inputs of {input_size} x {input_size} ({flag}), not {asked.input_size}")
    learned = {1: False, 2: True}.get(found.out_channels / found.in_channels)
    if learned is None:
        faults.append(f"{found.out_channels} output channels for {found.in_channels} of the input")
    elif learned != model.learn_sigma:
        faults.append("a learned variance (no --no-learn-sigma)" if learned else _NO_LEARNED_VARIANCE)
    faults += _label_differences(model, found.label_rows, hints.num_classes)
    if found.hidden_size == asked.hidden_size and found.mlp_size not in (None, asked.mlp_size):
        faults.append(f"MLPs of {found.mlp_size}, not {asked.mlp_size}")
    num_heads = model.blocks[0].attn.num_heads
    if found.size == asked.size and hints.num_heads not in (None, num_heads):
        faults.append(f"{hints.num_heads} heads, not {num_heads}")
    return faults


_NO_LEARNED_VARIANCE = "no learned variance (--no-learn-sigma)"


def _label_differences(model: DiT, rows: int, told: int | None) -> list[str]:
    """Compare rows of the label table: one per class, or one per class and one for the null label.

    The table does not tell which. `told`, the number of classes that stands beside the weights, does.
    """
    plain = f"{rows} classes without a null label (--num-classes {rows} --class-dropout-prob 0, no guidance)"
    with_null = f"{rows - 1} classes and the null label (--num-classes {rows - 1})"
    if told in (rows, rows - 1):
        if (model.num_classes, model.has_null_label) == (told, told < rows):
            return []
        return [plain if told == rows else with_null]
    if rows == model.num_classes + model.has_null_label:
        return []
    return [
        f"{rows} rows of labels, not {model.num_classes + model.has_null_label}: {plain}, or {with_null}, "
        "as it was trained"
    ]


def _size_of(preset) -> tuple[int, int, int]:
    return tuple(preset.keywords[name] for name in ("depth", "hidden_size", "patch_size"))


# ---- other names -----------------------------------------------------------------------------------


def from_diffusers(state: dict[str, Tensor], file: Path | str = "checkpoint") -> dict[str, Tensor]:
    """Rename diffusers' `DiTTransformer2DModel` weights to the official names.

    diffusers keeps q, k and v apart and a copy of the timestep and label embedders in every block; the copies
    must be equal. Its class computes slightly different numbers from the same weights (frequency shift 1
    instead of 0 in the timestep embedding, LayerNorm eps 1e-5 by default): the official model's are used
    here.
    """
    state = dict(state)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    state.pop("pos_embed.pos_embed", None)

    def take(name: str) -> Tensor:
        if name not in state:
            raise ValueError(f"{file} looks like diffusers' DiT but lacks {name}; is the file complete?")
        return state.pop(name)

    renamed = {}
    for kind in ("weight", "bias"):
        renamed[f"x_embedder.proj.{kind}"] = take(f"pos_embed.proj.{kind}")
        renamed[f"final_layer.adaLN_modulation.1.{kind}"] = take(f"proj_out_1.{kind}")
        renamed[f"final_layer.linear.{kind}"] = take(f"proj_out_2.{kind}")
    embedders = {"y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight"}
    for kind in ("weight", "bias"):
        for ours, theirs in (("0", "linear_1"), ("2", "linear_2")):
            embedders[f"t_embedder.mlp.{ours}.{kind}"] = f"timestep_embedder.{theirs}.{kind}"
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        for ours, theirs in embedders.items():
            copy = take(f"{block}norm1.emb.{theirs}")
            if not torch.equal(renamed.setdefault(ours, copy), copy):
                raise ValueError(
                    f"{file}: block {i} has another {theirs} than block 0; no DiT has one per block"
                )
        for kind in ("weight", "bias"):
            qkv = [take(f"{block}attn1.to_{part}.{kind}") for part in "qkv"]
            renamed[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
            renamed[f"blocks.{i}.attn.proj.{kind}"] = take(f"{block}attn1.to_out.0.{kind}")
            renamed[f"blocks.{i}.mlp.fc1.{kind}"] = take(f"{block}ff.net.0.proj.{kind}")
            renamed[f"blocks.{i}.mlp.fc2.{kind}"] = take(f"{block}ff.net.2.{kind}")
            renamed[f"blocks.{i}.adaLN_modulation.1.{kind}"] = take(f"{block}norm1.linear.{kind}")
    return renamed | state  # whatever is left over is refused by name
