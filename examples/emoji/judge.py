"""The judge of emoji pictures: an image encoder into the space of names, trained on the real pictures.

`train_judge.py` trains it. A concept's place in that space is MiniLM's embedding of its name, whitened.

| figure | is |
|---|---|
| retrieval | share of pictures whose asked concept is the nearest of all 1,423 |
| style | share whose style is told as asked |
| clip | mean cosine between a picture's place and its concept's: the "emoji-CLIP score" |
| FD | Frechet distance between the encoder's 128 features |
"""

import json
import math
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open
from torch import Tensor, nn

from backbones.prompts import read_prompts
from common.files import first_line
from examples.emoji import FOLDER, data
from examples.emoji.train_vae import to_float
from metrics.features import Features
from metrics.frechet import feature_statistics, frechet_distance

WEIGHTS = FOLDER / "weights" / "judge.safetensors"
STUDY_PROMPTS = FOLDER / "prompts" / "study.txt"
TEXT_CHANNELS, FEATURES = 192, 128
NUM_STYLES = len(data.STYLES)


class ImageEncoder(nn.Module):
    """Pictures (n, 3, 64, 64) in [-1, 1] to features (n, 128), places (n, 192) and styles."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(*(layer for row in BLOCKS for layer in _block(*row)))
        side = data.SIZE // math.prod(row[4] for row in BLOCKS)
        self.dropout = nn.Dropout(0.3)
        self.penultimate = nn.Linear(BLOCKS[-1][2] * side**2, FEATURES)
        self.head = nn.Linear(FEATURES, TEXT_CHANNELS)
        self.style = nn.Linear(FEATURES, NUM_STYLES)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # of the cosines in the loss

    def features(self, x: Tensor) -> Tensor:
        """Features (n, 128)."""
        x = x.contiguous(memory_format=torch.channels_last)  # the faster one on a CPU
        return self.penultimate(self.dropout(self.backbone(x).flatten(1)))

    def places(self, features: Tensor) -> Tensor:
        """Unit vectors (n, 192) in the space of names."""
        return F.normalize(self.head(F.relu(features)), dim=1)

    def concept_logits(self, features: Tensor, places: Tensor) -> Tensor:
        """Scaled cosines (n, m) with m places."""
        return self.log_scale.clamp(max=math.log(60.0)).exp() * self.places(features) @ places.T

    def style_logits(self, features: Tensor) -> Tensor:
        """(n, 3)."""
        return self.style(F.relu(features))


# EfficientNet-Lite0 as far as it is used: channels in, hidden, out; kernel, stride. The first is the stem;
# the last stride is left out, so that small pictures keep 4 x 4 places.
BLOCKS = (
    (3, 0, 32, 3, 2), (32, 32, 16, 3, 1),
    (16, 96, 24, 3, 2), (24, 144, 24, 3, 1), (24, 144, 40, 5, 2), (40, 240, 40, 5, 1),
    (40, 240, 80, 3, 2), (80, 480, 80, 3, 1), (80, 480, 80, 3, 1),
    (80, 480, 112, 5, 1), (112, 672, 112, 5, 1), (112, 672, 112, 5, 1),
    (112, 672, 192, 5, 1), (192, 1152, 192, 5, 1),
)  # fmt: skip


def _convolution(before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list:
    """Convolution, padded as TensorFlow pads, and batch norm."""
    total = kernel - stride
    padding = [] if total == 0 else [nn.ZeroPad2d((total // 2, total - total // 2) * 2)]
    norm = nn.BatchNorm2d(after, eps=1e-3, momentum=0.05)
    return [*padding, nn.Conv2d(before, after, kernel, stride, groups=groups, bias=False), norm]


def _block(before: int, hidden: int, after: int, kernel: int, stride: int) -> list:
    if not hidden:
        return [*_convolution(before, after, kernel, stride), nn.ReLU6()]
    widened = [] if hidden == before else [*_convolution(before, hidden), nn.ReLU6()]
    depthwise = [*_convolution(hidden, hidden, kernel, stride, groups=hidden), nn.ReLU6()]
    layers = nn.Sequential(*widened, *depthwise, *_convolution(hidden, after))
    return [Residual(layers) if stride == 1 and before == after else layers]


class Residual(nn.Module):
    """x + layers(x)."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Judge:
    """Scores uint8 pictures (n, 64, 64, 3) with trained weights.

    Raises FileNotFoundError or ValueError in one line.
    """

    def __init__(self, weights: Path | None = None):
        weights = weights or WEIGHTS
        if not weights.is_file():
            raise FileNotFoundError(
                f"{weights} does not exist; `python -m examples.emoji.train_judge` makes it"
            )
        try:
            self._load(weights)
        except (SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{weights} holds no judge of this version ({first_line(error)}); train it again"
            ) from None

    def _load(self, weights: Path) -> None:
        tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
        with safe_open(weights, "pt") as file:
            self.concepts = json.loads(file.metadata()["concepts"])
        self.places = F.normalize(tensors.pop("places"), dim=1)  # (concepts, 192)
        self.data_statistics = tuple(tensors.pop(name).double().numpy() for name in ("mean", "covariance"))
        self.encoder = ImageEncoder().eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.encoder.load_state_dict(tensors)

    @cached_property
    def _number(self) -> dict[str, int]:
        pairs = [(name, style) for name in self.concepts for style in data.STYLES]
        return {data.caption(*pair): index for index, pair in enumerate(pairs)}

    def numbers(self, captions: list[str]) -> Tensor:
        """Index (n,) of each caption. Raises ValueError for one that is no concept's."""
        unknown = next((text for text in captions if text not in self._number), None)
        if unknown is not None:
            raise ValueError(
                f"the judge knows no caption {unknown!r}; give a concept and a style of the data"
            )
        return torch.tensor([self._number[text] for text in captions])

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Features (n, 128) of uint8 pictures (n, 64, 64, 3)."""
        if images.shape[1:] != (data.SIZE, data.SIZE, 3) or images.dtype != torch.uint8:
            raise ValueError(f"the judge reads uint8 64 x 64 x 3 pictures, not {tuple(images.shape[1:])}")
        return torch.cat([self.encoder.features(to_float(batch)) for batch in images.split(batch_size)])

    def scores(self, features: Tensor, captions: Tensor) -> dict[str, Tensor]:
        """For each picture whether its asked concept is the nearest and its style the asked one; the cosine.

        captions (n,): as `numbers` returns them.
        """
        cosines = self.encoder.places(features) @ self.places.T  # (n, concepts)
        concept, style = captions // NUM_STYLES, captions % NUM_STYLES
        return {
            "retrieval": cosines.argmax(1) == concept,
            "style": self.encoder.style_logits(features).argmax(1) == style,
            "clip": cosines[torch.arange(len(cosines)), concept],
        }

    def figures(self, features: Tensor, captions: Tensor) -> dict[str, float]:
        """retrieval, style, clip and fd_data of pictures with these features and asked captions (n,)."""
        found = self.scores(features, captions)
        scores = {name: value.double().mean().item() for name, value in found.items()}
        distance = frechet_distance(*feature_statistics(features.numpy()), *self.data_statistics)
        return scores | {"fd_data": distance}


class StudyJudge:
    """The judge of the study: labels are numbers of its prompts, images are decoded samples."""

    compared = ("fd_data", "retrieval", "style", "clip")  # measured on the uncached samples too

    def __init__(self):
        self._judge = Judge()
        self._captions = self._judge.numbers(read_prompts(STUDY_PROMPTS))

    def features(self, _x_0: Tensor, images: Tensor) -> Tensor:
        """Features (n, 128) of uint8 pictures (n, 64, 64, 3)."""
        return self._judge.features(images)

    def figures(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        return self._judge.figures(features, self._captions[labels])


class EmojiFeatures:
    """The extractor behind `evaluate.py --features emoji`; it reads uint8 pictures (n, 64, 64, 3).

    The probabilities are those of the concepts.
    """

    def __init__(self):
        self._judge = Judge()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        pool, encoder = self._judge.features(images), self._judge.encoder
        return Features(pool, None, encoder.concept_logits(pool, self._judge.places).softmax(1))


SPLITS = {
    "train": data.TRAIN,
    "held_out_pairs": data.HELD_OUT_PAIR,
    "held_out_concepts": data.HELD_OUT_CONCEPT,
}


def real_figures(
    judge: Judge, emoji: data.EmojiData, splits: tuple[str, ...] = tuple(SPLITS)
) -> dict[str, dict[str, float]]:
    """The judge's figures of the real pictures, by split."""
    captions = torch.from_numpy(emoji.concept.astype(np.int64) * NUM_STYLES + emoji.style)
    found = {}
    for name in splits:
        chosen = torch.from_numpy(emoji.split == SPLITS[name])
        if chosen.sum() > 1:
            features = judge.features(torch.from_numpy(emoji.images)[chosen])
            figures = judge.figures(features, captions[chosen])
            found[name] = {key: round(value, 4) for key, value in figures.items()}
    return found
