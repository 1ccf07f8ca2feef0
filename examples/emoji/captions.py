"""The prompts that ship with the models: their texts, their token states, and latents for Learning-to-Cache.

    python -m examples.emoji.captions        # of results/emoji into examples/emoji/prompts and weights

| file | holds |
|---|---|
| `prompts/study.txt` | 500 captions that the study measures on, 300 of them trained on |
| `prompts/train.txt` | 192 other captions of training pictures, for routers |
| `prompts/demo.txt` | 8 prompts of the demo |
| `prompts/sheet.txt` | 60 prompts to look at |
| `weights/captions.safetensors` | the token states of all of these |
| `weights/latents.safetensors` | latents of the pictures of `train.txt`, in its order |

Of ten prompts of the study six are captions of pictures that the model was trained on, three are held-out
pairs and one is of a held-out concept. The sheet has the demo's, 40 of the study's, and things that no
picture of the data shows.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backbones.captions import write_captions
from common import cli
from common.files import replacing
from examples.emoji import FOLDER, WEIGHTS, data, encode, text

PROMPTS = FOLDER / "prompts"
LATENTS = WEIGHTS / "latents.safetensors"
STUDY = {data.TRAIN: 300, data.HELD_OUT_PAIR: 150, data.HELD_OUT_CONCEPT: 50}
TRAIN = 192
DEMO = (
    "green heart, 3d style",
    "red apple, flat style",
    "fire engine, 3d style",
    "cat face, soft style",
    "pizza, 3d style",
    "snowman, flat style",
    "sunflower, soft style",
    "rocket, 3d style",
)
# Things that no picture of the data shows, some of them in words that no caption has.
NEW = (
    "blue apple, flat style",
    "purple fire engine, 3d style",
    "green cat face, soft style",
    "golden fish, 3d style",
    "red car, flat style",
    "blue car, flat style",
    "yellow umbrella, 3d style",
    "black heart with flowers, soft style",
    "pink elephant, 3d style",
    "orange snowman, flat style",
    "a bowl of strawberries, 3d style",
    "a small house by the sea, soft style",
)


def chosen_pictures(emoji: data.EmojiData, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pictures whose captions are the study's, mixed evenly, and those of the routers'."""
    generator = np.random.default_rng(seed)
    order = {split: generator.permutation(np.flatnonzero(emoji.split == split)) for split in STUDY}
    taken = {split: order[split][:count] for split, count in STUDY.items()}
    place = {split: (np.arange(len(found)) + 0.5) / max(1, len(found)) for split, found in taken.items()}
    mixed = np.argsort(np.concatenate(list(place.values())), kind="stable")
    study = np.concatenate(list(taken.values()))[mixed]
    rest = order[data.TRAIN][STUDY[data.TRAIN] :]
    return study, rest[:TRAIN]


def training_latents() -> tuple[Tensor, Tensor]:
    """Latents (192, 4, 16, 16), and their labels: the numbers of the prompts in `prompts/train.txt`."""
    if not LATENTS.is_file():
        raise FileNotFoundError(f"{LATENTS} does not exist; `python -m examples.emoji.captions` makes it")
    latents = load_file(LATENTS)["latents"].float()
    return latents, torch.arange(len(latents))


def write_prompts(file: Path, prompts: list[str]) -> None:
    with replacing(file) as partial:
        partial.write_text("".join(f"{prompt}\n" for prompt in prompts))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Choose and encode the prompts that ship.")
    parser.add_argument("--data", type=Path, default=data.FOLDER / "emoji.npz")
    parser.add_argument("--encoded", type=Path, default=data.FOLDER / "encoded.safetensors")
    parser.add_argument("--text-encoder", help=f"folder or Hub id; default: {text.default_source()}")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder with prompts/ and weights/")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    emoji, encoded = data.load(args.data), encode.load(args.encoded)
    captions = emoji.captions
    study, train = chosen_pictures(emoji)
    shown = [captions[i] for i in study[:40]]
    prompts = {
        "study": [captions[i] for i in study],
        "train": [captions[i] for i in train],
        "demo": list(DEMO),
        "sheet": [*DEMO, *shown, *NEW],
    }
    for name, texts in prompts.items():
        write_prompts(args.output / "prompts" / f"{name}.txt", texts)
    every = list(dict.fromkeys([*(one for texts in prompts.values() for one in texts), ""]))
    states = text.encode(every, args.text_encoder)
    file = args.output / "weights" / "captions.safetensors"
    write_captions(file, every, states.states.numpy(), states.lengths.numpy())
    latents = encoded.latents[torch.from_numpy(train)].half().contiguous()
    with replacing(args.output / "weights" / "latents.safetensors") as partial:
        save_file({"latents": latents}, partial)
    print(f"wrote {len(every)} prompts to {args.output / 'prompts'} and {file}")


if __name__ == "__main__":
    cli.run(main, parse_args())
