"""Model checkpoints: official DiT files, DiT training runs and diffusers' DiT layout, all to official names.

Nothing in a checkpoint is executed: pickles are read with `weights_only=True`.
"""

from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from files import load_pickle_safely
from models import DiT

# Where diffusers keeps a DiT: a pipeline folder, or the transformer's own.
_DIFFUSERS_FILES = [
    f"{folder}diffusion_pytorch_model{suffix}"
    for folder in ("transformer/", "")
    for suffix in (".safetensors", ".bin")
]


def load_checkpoint(model: DiT, path: str | Path) -> None:
    """Load weights strictly: every parameter of `model` and nothing else.

    path: an official file (a bare state dict), a training run's (`{"ema": ...}`, of which the EMA is taken),
    a safetensors file, or diffusers' layout as a file or a folder. Raises FileNotFoundError or ValueError in
    one line.
    """
    file = _find_file(Path(path))
    state = _read(file)
    if isinstance(state, dict) and isinstance(state.get("ema"), dict):
        state = state["ema"]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{file} holds no state dict but a {type(state).__name__}; give a DiT checkpoint")
    if any(name.startswith("transformer_blocks.") for name in state):
        state = from_diffusers(state, file)
    state.setdefault("pos_embed", model.pos_embed.detach())  # fixed: diffusers and some exports leave it out
    _require_match(model, state, file)
    model.load_state_dict(state)


def _find_file(path: Path) -> Path:
    candidates = [path, *(path / name for name in _DIFFUSERS_FILES)]
    for file in candidates:
        if file.is_file():
            return file
    if path.is_dir():
        raise FileNotFoundError(
            f"folder {path} holds none of {', '.join(_DIFFUSERS_FILES)}; give the checkpoint file"
        )
    raise FileNotFoundError(f"checkpoint {path} does not exist; download.py fetches the official ones")


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        return load_pickle_safely(file)
    try:
        return load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file ({error})") from None


def _require_match(model: DiT, state: dict[str, Tensor], file: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    faults = [f"{name} is missing" for name in expected.keys() - found.keys()]
    faults += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    shared = expected.keys() & found.keys()
    faults += [f"{n} is {found[n]}, not {expected[n]}" for n in shared if found[n] != expected[n]]
    if faults:
        shown = "; ".join(sorted(faults)[:3])
        raise ValueError(
            f"{file} does not fit this model ({len(faults)} differences: {shown}); "
            "check --model, --image-size and --num-classes"
        )


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
