"""Prompts that ship encoded with a model and need no encoder: their file, and prompts out of it.

The file is safetensors: `states` (sum of lengths, D) float16, one caption after the other, `lengths` (m,),
and the captions as a JSON list, `captions`, in its metadata. The null prompt "" is one of them.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors
from safetensors import safe_open
from safetensors.numpy import save_file

from backbones.prompts import NULL_PROMPT, Prompts, normalized
from common.files import replacing


def write_captions(path: Path, captions: Sequence[str], states: np.ndarray, lengths: np.ndarray) -> None:
    """captions: m texts. states (sum of lengths, D) and lengths (m,), as the module describes them."""
    tensors = {"states": states.astype(np.float16), "lengths": lengths.astype(np.int32)}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"captions": json.dumps(list(captions))})


def read_captions(path: Path) -> dict[str, np.ndarray]:
    """States (length, D) by normalized caption; empty where there is no file.

    Raises ValueError, naming the file, where it cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "np") as file:
            captions = json.loads(file.metadata()["captions"])
            states, lengths = file.get_tensor("states"), file.get_tensor("lengths")
        parts = np.split(states, np.cumsum(lengths)[:-1])
        return {normalized(text): part for text, part in zip(captions, parts, strict=True)}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no encoded captions ({error}); fetch it again") from None


def with_captions(
    texts: Sequence[str], file: Path, num_tokens: int, encode: Callable[[list[str]], Prompts]
) -> Prompts:
    """The embeddings of some texts: out of a file those that it holds, by `encode` the others.

    num_tokens: L, to which all are filled up with zeros.
    """
    rows, known = [normalized(text) for text in (*texts, NULL_PROMPT)], read_captions(file)
    missing = [text for text in dict.fromkeys(rows) if text not in known]
    if missing:
        encoded = encode(missing)  # all at once
        for text, states, length in zip(missing, encoded.states, encoded.lengths, strict=False):
            known[text] = np.asarray(states[:length])
    found = [known[text][:num_tokens] for text in rows]
    states = np.zeros((len(rows), num_tokens, found[0].shape[1]), np.float16)
    for row, part in zip(states, found, strict=True):
        row[: len(part)] = part
    lengths = np.array([len(part) for part in found], np.int32)
    key = hashlib.sha256(states.tobytes() + lengths.tobytes()).hexdigest()[:16]
    return Prompts(states, lengths, key)
