"""Prompts as embeddings: encoded once by T5, or any encoder that transformers loads, and kept on disk.

The encoder is gone when the embeddings are there, so a training or a large sampling never holds it. A set of
prompts lies in a folder of its own, named by a hash of the encoder and the texts:

| file | holds |
|---|---|
| `states.npy` | (m + 1, L, D) float16, the last hidden states; the last row is that of the null prompt, "" |
| `lengths.npy` | (m + 1,) int32, how many of the L tokens belong to the prompt |
| `info.json` | encoder, number of tokens, and how many rows are done |

Batches are written one after the other; after an interruption the same call goes on with what is missing.
"""

import gc
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.files import first_line, make_folder, read_json, write_json, writing

FOLDER = Path(__file__).parents[1] / "results" / "prompts"
NULL_PROMPT = ""


@dataclass(frozen=True)
class Prompts:
    """Embeddings of m prompts and, in row m, of the null prompt; memory-mapped."""

    states: np.ndarray
    lengths: np.ndarray
    key: str = "random"  # the hash of encoder and texts

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
    if _done(place) == len(rows):  # any number of processes may read
        return open_prompts(place)
    make_folder(place)
    with writing(place):
        done = _done(place)
        if done < len(rows):
            _encode(rows, encoder, num_tokens, place, done, batch_size, torch.device(device), dtype)
    return open_prompts(place)


def _done(place: Path) -> int:
    """How many rows of a folder are written."""
    info = place / "info.json"
    return read_json(info)["done"] if info.is_file() else 0


def open_prompts(place: Path) -> Prompts:
    """Embeddings in a folder that `encode_prompts` filled. Raises ValueError where they are not complete."""
    states, lengths = (np.load(place / f"{name}.npy", mmap_mode="r") for name in ("states", "lengths"))
    if _done(place) != len(lengths):
        raise ValueError(f"{place} is not complete; encode the prompts again to go on")
    return Prompts(states, lengths, place.name)


def _key(rows: Sequence[str], encoder: str, num_tokens: int) -> str:
    digest = hashlib.sha256(f"{os.path.basename(os.path.normpath(encoder))}\n{num_tokens}\n".encode())
    for folder in (Path(encoder), Path(encoder) / "text_encoder"):
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
def _encode(
    rows: Sequence[str], encoder: str | Path, num_tokens: int, place: Path, done: int, batch_size: int,
    device: torch.device, dtype: torch.dtype,
) -> None:  # fmt: skip
    tokenizer, model = load_encoder(encoder)
    model.to(device=device, dtype=dtype)
    width = model.config.d_model if hasattr(model.config, "d_model") else model.config.hidden_size
    shapes = {"states": (np.float16, (len(rows), num_tokens, width)), "lengths": (np.int32, (len(rows),))}
    arrays = {}
    for name, (kind, shape) in shapes.items():
        file = place / f"{name}.npy"
        mode = "r+" if done and file.is_file() else "w+"
        arrays[name] = np.lib.format.open_memmap(file, mode, kind, shape)
    bar = tqdm(total=len(rows), initial=done, desc="prompts", unit="prompt", disable=None)
    for start in range(done, len(rows), batch_size):
        part = list(rows[start : start + batch_size])
        tokens = tokenizer(
            part, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt"
        ).to(device)
        states = model(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        if not bool(states.isfinite().all()):
            raise ValueError(f"the encoder {encoder} returns values that are not finite; use float32")
        end = start + len(part)
        arrays["states"][start:end] = states.half().cpu().numpy()
        arrays["lengths"][start:end] = tokens.attention_mask.sum(1).cpu().numpy()
        for array in arrays.values():
            array.flush()
        write_json(
            place / "info.json",
            {"encoder": str(encoder), "num_tokens": num_tokens, "rows": len(rows), "done": end},
        )
        bar.update(len(part))
    bar.close()
    del model
    gc.collect()


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
