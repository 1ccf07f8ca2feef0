"""Prompts as embeddings, encoded once and kept on disk.

They are made by T5 or any encoder that transformers loads (`encode_prompts`, as PixArt has them), or by the
encoders of a pipeline of diffusers together (`encode_by_pipeline`). The encoders are gone when the embeddings
are there, so a training or a large sampling never holds them. A set of prompts lies in a folder of its own,
named by a hash of the encoder and the texts:

| file | holds |
|---|---|
| `states.npy` | (m + 1, L, D) float16, the last hidden states; the last row is that of the null prompt, "" |
| `lengths.npy` | (m + 1,) int32, how many of the L tokens belong to the prompt |
| `pooled.npy` | (m + 1, P) float16, a vector for each prompt, for the models that take one |
| `info.json` | encoder, number of tokens, and how many rows are done |

Batches are written one after the other; after an interruption the same call goes on with what is missing.
"""

import gc
import hashlib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from backbones.inputs import Inputs
from common.files import first_line, make_folder, read_json, write_json, writing

FOLDER = Path(__file__).parents[1] / "results" / "prompts"
NULL_PROMPT = ""


@dataclass(frozen=True)
class Prompts:
    """Embeddings of m prompts and, in row m, of the null prompt; memory-mapped."""

    states: np.ndarray
    lengths: np.ndarray
    key: str = "random"  # the hash of encoder and texts
    pooled: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths) - 1

    @property
    def num_tokens(self) -> int:
        return self.states.shape[1]

    @property
    def channels(self) -> int:
        return self.states.shape[2]

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of prompts by number: states (n, L, D) in float32 and mask (n, L), True where a token belongs."""
        rows = np.asarray(numbers, dtype=np.int64)
        states = torch.from_numpy(self.states[rows].astype(np.float32))
        mask = torch.arange(self.num_tokens) < torch.from_numpy(self.lengths[rows].astype(np.int64))[:, None]
        return states, mask

    def pooled_batch(self, numbers: Sequence[int]) -> Tensor | None:
        """Of prompts by number: their vectors (n, P) in float32; None where they have none."""
        if self.pooled is None:
            return None
        return torch.from_numpy(self.pooled[np.asarray(numbers, dtype=np.int64)].astype(np.float32))


Encode = Callable[[list[str]], dict[str, Tensor]]  # texts to states (n, L, D), lengths (n,), pooled (n, P)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are left out. Raises OSError or ValueError, naming the file."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); give one prompt a line") from None
    if not any(lines):
        raise ValueError(f"{path} holds no prompt; give one a line")
    return [line for line in lines if line]


def normalized(text: str) -> str:
    """As PixArt's pipelines have captions: lower case, without space around them."""
    return text.lower().strip()


def encode_prompts(
    texts: Sequence[str],
    encoder: str | Path,
    num_tokens: int,
    folder: Path | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Prompts:
    """The embeddings of some texts, from disk where they are there, else by the encoder.

    encoder: a folder, or an id of the Hub, of tokenizer and encoder as transformers loads them; those of a
    pipeline are its `tokenizer` and `text_encoder`. num_tokens: L, longer texts are cut there. Raises OSError
    or ValueError in one line where the encoder cannot be had or does not fit.
    """
    rows = [normalized(text) for text in (*texts, NULL_PROMPT)]
    place = (folder or FOLDER) / _key(rows, str(encoder), num_tokens)

    def load() -> Encode:
        return _one_encoder(encoder, num_tokens, torch.device(device), dtype)

    info = {"encoder": str(encoder), "num_tokens": num_tokens}
    found = _stored(place, rows, load, info, batch_size)
    for text, length in zip(texts, found.lengths, strict=False):
        if length >= num_tokens:
            warnings.warn(
                f"the prompt {text[:40]!r} fills all {num_tokens} tokens of the model; what is beyond is not "
                "read"
            )
    return found


def encode_by_pipeline(
    texts: Sequence[str],
    source: str | Path,
    row: Inputs,
    config: Mapping[str, Any],
    folder: Path | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Prompts:
    """The embeddings of some texts by `encode_prompt` of the pipeline that a row of `INPUTS` names.

    source: the folder of a pipeline, of which the transformer and the VAE are not loaded. config: the
    transformer's. Raises OSError or ValueError in one line where it cannot be had.
    """
    null_prompt = NULL_PROMPT if row.null_prompt is None else row.null_prompt
    rows = [*texts, null_prompt]
    place = (folder or FOLDER) / _key([row.pipeline, *rows], str(source), row.num_tokens)

    def load() -> Encode:
        return _encoders_of_pipeline(source, row, config, null_prompt, torch.device(device), dtype)

    found = _stored(place, rows, load, {"encoder": str(source), "pipeline": row.pipeline}, batch_size)
    longest = int(found.lengths.max()) if row.trimmed else found.num_tokens
    return Prompts(found.states[:, :longest], found.lengths, found.key, found.pooled)


def _stored(
    place: Path, rows: Sequence[str], load: Callable[[], Encode], info: dict, batch_size: int
) -> Prompts:
    """The embeddings of `rows` in a folder; what is not there yet is encoded, by encoders loaded for it."""
    if _done(place) == len(rows):  # any number of processes may read
        return open_prompts(place)
    make_folder(place)
    with writing(place):
        done = _done(place)
        if done < len(rows):
            _fill(place, rows, done, load(), info, batch_size)
    gc.collect()  # the encoders
    return open_prompts(place)


def _done(place: Path) -> int:
    """How many rows of a folder are written."""
    info = place / "info.json"
    return read_json(info)["done"] if info.is_file() else 0


def open_prompts(place: Path) -> Prompts:
    """Embeddings in a folder that `encode_prompts` filled. Raises ValueError where they are not complete."""
    arrays = {
        name: np.load(place / f"{name}.npy", mmap_mode="r")
        for name in ("states", "lengths", "pooled")
        if name != "pooled" or (place / "pooled.npy").is_file()
    }
    if _done(place) != len(arrays["lengths"]):
        raise ValueError(f"{place} is not complete; encode the prompts again to go on")
    return Prompts(**arrays, key=place.name)


def _key(rows: Sequence[str], encoder: str, num_tokens: int) -> str:
    digest = hashlib.sha256(f"{os.path.basename(os.path.normpath(encoder))}\n{num_tokens}\n".encode())
    for folder in (Path(encoder), *sorted(Path(encoder).glob("text_encoder*"))):
        for file in sorted(folder.glob("*")) if folder.is_dir() else ():
            if file.suffix in (".json", ".safetensors", ".bin"):
                digest.update(_sample_of(file))
    digest.update("\n".join(rows).encode())
    return digest.hexdigest()[:16]


def _sample_of(file: Path, blocks: int = 64, size: int = 2**16) -> bytes:
    """Blocks of a file spread evenly over it: what another training of the same encoder would change."""
    length = file.stat().st_size
    with open(file, "rb") as stream:
        found = [str(length).encode()]
        for k in range(blocks if length > blocks * size else 1):
            stream.seek(k * length // blocks)
            found.append(stream.read(size if length > blocks * size else length))
    return b"".join(found)


@torch.no_grad()
def _fill(place: Path, rows: Sequence[str], done: int, encode: Encode, info: dict, batch_size: int) -> None:
    """Encode the rows from `done` on, the null prompt by itself, and write them batch by batch."""
    arrays: dict[str, np.memmap] = {}
    bar = tqdm(total=len(rows), initial=done, desc="prompts", unit="prompt", disable=None)
    while done < len(rows):
        end = len(rows) if done == len(rows) - 1 else min(done + batch_size, len(rows) - 1)
        for name, values in encode(list(rows[done:end])).items():
            kind = np.int32 if name == "lengths" else np.float16
            part = values.cpu().float().numpy().astype(kind)
            if not np.isfinite(part).all():
                raise ValueError(
                    f"the encoder {info['encoder']} returns values that are not finite, or beyond 65504; use "
                    "another one"
                )
            if name not in arrays:
                file = place / f"{name}.npy"
                mode = "r+" if done and file.is_file() else "w+"
                shape = (len(rows), *part.shape[1:])
                arrays[name] = np.lib.format.open_memmap(file, mode, kind, None if mode == "r+" else shape)
            arrays[name][done:end] = part
            arrays[name].flush()
        bar.update(end - done)
        done = end
        write_json(place / "info.json", info | {"rows": len(rows), "done": done})
    bar.close()


def _one_encoder(encoder: str | Path, num_tokens: int, device: torch.device, dtype: torch.dtype) -> Encode:
    tokenizer, model = load_encoder(encoder)
    model.to(device=device, dtype=dtype)

    def encode(texts: list[str]) -> dict[str, Tensor]:
        tokens = tokenizer(
            texts, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt"
        ).to(device)
        states = model(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return {"states": states, "lengths": tokens.attention_mask.sum(1)}

    return encode


def _encoders_of_pipeline(
    source: str | Path, row: Inputs, config: Mapping[str, Any], null_prompt: str, device: torch.device,
    dtype: torch.dtype,
) -> Encode:  # fmt: skip
    """The pipeline's `encode_prompt`, its states filled up with zeros to the row's number of tokens."""
    import diffusers  # slow to import

    cls = getattr(diffusers, row.pipeline)
    try:
        pipeline = cls.from_pretrained(source, local_files_only=True, transformer=None, vae=None)
        pipeline.to(device=device, dtype=dtype)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise OSError(
            f"the text encoders of {source} cannot be had ({first_line(error)}); give the folder of a "
            f"{row.pipeline} with --text-encoder"
        ) from None
    pipeline.transformer = SimpleNamespace(config=config)  # asked for the width of an absent encoder
    call = inspect.signature(cls.__call__).parameters
    options = {"max_sequence_length": call["max_sequence_length"].default} | dict(row.options)
    instructed = {name: call[name].default for name in row.instructed}

    def encode(texts: list[str]) -> dict[str, Tensor]:
        own = {} if texts == [null_prompt] else instructed
        try:
            returned = pipeline.encode_prompt(prompt=texts, device=device, **options, **own)
        except (AttributeError, TypeError) as error:  # an encoder that is not there
            raise OSError(
                f"the text encoders of {source} are not complete ({first_line(error)}); give the folder of a "
                f"{row.pipeline} with --text-encoder"
            ) from None
        found = {name: one for name, one in zip(row.encoded, returned, strict=True) if name}
        states, mask = found["states"], found.pop("mask", None)
        lengths = torch.full((len(texts),), states.shape[1]) if mask is None else mask.sum(1)
        if mask is not None and not bool((mask.bool().cummin(1).values == mask.bool()).all()):
            raise ValueError(f"the tokenizer of {source} pads on the left; set its padding_side to right")
        missing = row.num_tokens - states.shape[1] if row.trimmed else 0
        found["states"] = torch.nn.functional.pad(states, (0, 0, 0, missing))
        return found | {"lengths": lengths}

    return encode


def load_encoder(source: str | Path):
    """(tokenizer, encoder) as transformers gives them, frozen; source: a folder, a pipeline's, or a Hub id.

    Of an encoder-decoder such as T5 the encoder alone. Raises OSError or ValueError in one line.
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
    except ImportError:
        raise ValueError("prompts need transformers; install it with `pip install transformers`") from None
    parts, alone = ("tokenizer", "text_encoder"), ("", "")
    folder = Path(source)
    layouts = [parts, alone]  # of an id of the Hub nothing tells beforehand
    if folder.is_dir():
        layouts = [parts if all((folder / part).is_dir() for part in parts) else alone]
    for tokenizer_at, encoder_at in layouts:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, subfolder=tokenizer_at)
            config = AutoConfig.from_pretrained(source, subfolder=encoder_at)
            loader = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
            encoder = loader.from_pretrained(source, subfolder=encoder_at)
            break
        except (OSError, ValueError) as error:
            reason = first_line(error)
    else:
        raise OSError(f"the text encoder {source} cannot be had ({reason}); give its folder") from None
    return tokenizer, encoder.eval().requires_grad_(False)
