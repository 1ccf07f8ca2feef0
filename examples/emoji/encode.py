"""Encode the emoji once for the transformer's training: latents by the VAE, captions by the text encoder.

    python -m examples.emoji.encode

Writes encoded.safetensors (about 60 MB), all that `train_pixart` reads, so that it can be taken to another
machine alone.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import safe_open, save_file
from torch import Tensor

from common import cli
from common.files import replacing
from examples.emoji import data, text
from examples.emoji.train_vae import encode as encode_images


@dataclass(frozen=True)
class Encoded:
    """The training data in memory.

    latents (n, 4, 16, 16), concept, style and split (n,) as in `data.EmojiData`; `text` holds the states of
    both names of each concept in each style, and the null prompt's last.
    """

    latents: Tensor
    concept: Tensor
    style: Tensor
    split: Tensor
    text: text.TokenStates
    digest: str  # tells one encoding from another

    @property
    def null_caption(self) -> int:
        """Index of the null prompt in `text`."""
        return len(self.text.lengths) - 1

    def caption(self, concept: Tensor, style: Tensor, alias: Tensor | int = 0) -> Tensor:
        """Index in `text` of the captions of (concept, style); alias 1 takes the concept's second name."""
        num_captions = self.null_caption // 2
        return alias * num_captions + concept * len(data.STYLES) + style


def all_captions(emoji: data.EmojiData) -> list[str]:
    """In the order that `Encoded.caption` indexes."""
    named = [*emoji.concepts, *emoji.aliases]
    return [data.caption(name, style) for name in named for style in data.STYLES] + [""]


def save(path: Path, emoji: data.EmojiData, latents: Tensor, states: text.TokenStates) -> None:
    tensors = {
        "latents": latents.half().contiguous(),
        "concept": torch.from_numpy(emoji.concept).long(),
        "style": torch.from_numpy(emoji.style).long(),
        "split": torch.from_numpy(emoji.split).long(),
        "states": states.states,
        "lengths": states.lengths,
    }
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"concepts": json.dumps(emoji.concepts)})


def load(path: Path, device: str = "cpu") -> Encoded:
    """Read what the command wrote. Raises FileNotFoundError or ValueError in one line."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; `python -m examples.emoji.encode` makes it")
    try:
        with safe_open(path, "pt", device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it and make it again") from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    states = text.TokenStates(tensors.pop("states"), tensors.pop("lengths"))
    return Encoded(tensors.pop("latents").float(), **tensors, text=states, digest=digest)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Encode pictures and captions for train_pixart.")
    parser.add_argument("--data", type=Path, default=data.FOLDER / "emoji.npz")
    parser.add_argument("--vae", type=Path, default=data.FOLDER / "vae", help="folder that train_vae wrote")
    parser.add_argument("--text-encoder", help=f"folder or Hub id; default: {text.default_source()}")
    parser.add_argument("--output", type=Path, default=data.FOLDER / "encoded.safetensors")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL  # slow to import

    emoji = data.load(args.data)
    states = text.encode(all_captions(emoji), args.text_encoder)
    vae = AutoencoderKL.from_pretrained(args.vae)
    latents = encode_images(vae, torch.from_numpy(emoji.images))
    save(args.output, emoji, latents, states)
    spread = ", ".join(f"{value:.3f}" for value in latents.std((0, 2, 3)))
    print(f"wrote {args.output}: {len(latents)} latents (spread {spread}), {len(states.lengths)} captions")


if __name__ == "__main__":
    cli.run(main, parse_args())
