"""The judge of emoji pictures: an image encoder into the space of captions, trained on the real pictures.

    python -m examples.emoji.judge            # trains it, prints its figures, writes its weights

A caption's place is its mean token state (MiniLM's sentence embedding), whitened to 192 channels over the
training captions. The encoder, a small CNN, is trained as CLIP's is, but the captions stay where they are: a
picture's own caption has to be the nearest of all training captions, under shifts, turns, blur, noise and
other colours. Held-out pairs and concepts are neither pictures nor captions of the training.

| figure | is |
|---|---|
| retrieval | share of pictures whose asked caption is the nearest of those of all concepts in its style |
| style | share whose asked caption is the nearest of its concept's three styles |
| clip | mean cosine between a picture's place and its caption's: the "emoji-CLIP score" |
| FD | Frechet distance between the CNN's 128 features |

Run the same command again to go on after an interruption: every iteration draws from its own seed.
"""

import argparse
import json
import math
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

from common import cli
from common.files import replacing
from examples.emoji import data, encode
from examples.emoji.state import TrainingState, iteration_seed
from examples.emoji.text import TokenStates
from examples.emoji.train_vae import to_float
from metrics.features import Features
from metrics.frechet import feature_statistics, frechet_distance

WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"
TEXT_CHANNELS, FEATURES = 192, 128
NUM_STYLES = len(data.STYLES)
WARMUP = 100


class ImageEncoder(nn.Module):
    """A residual CNN from pictures (n, 3, 64, 64) in [-1, 1] to features (n, 128) and places (n, 192)."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 160), blocks: tuple[int, ...] = (0, 1, 2, 1)):
        super().__init__()
        layers, before = [], 3
        for width, count in zip(widths, blocks, strict=True):
            layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [Residual(width) for _ in range(count)]
            before = width
        side = data.SIZE // 2 ** len(widths)
        self.convolutions = nn.Sequential(*layers)  # (n, widths[-1], 4, 4)
        self.dropout = nn.Dropout(0.2)
        self.penultimate = nn.Linear(before * side**2, FEATURES)
        self.head = nn.Linear(FEATURES, TEXT_CHANNELS)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # of the cosines in the loss

    def features(self, x: Tensor) -> Tensor:
        """Features (n, 128)."""
        return self.penultimate(self.dropout(self.convolutions(x).flatten(1)))

    def places(self, features: Tensor) -> Tensor:
        """Unit vectors (n, 192) in the space of captions."""
        return F.normalize(self.head(F.relu(features)), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.places(self.features(x))


class Residual(nn.Module):
    """x + two convolutions of x."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


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

    MiniLM's sentence embeddings of captions that share two words of four lie close together.
    """
    mean = embeddings[train].double().mean(0)
    centred = embeddings.double() - mean
    values, vectors = torch.linalg.eigh(centred[train].T @ centred[train] / len(train))
    values, vectors = values[-channels:], vectors[:, -channels:]
    vectors = vectors * vectors.sum(0).sign()  # eigh leaves the sign open
    return F.normalize(centred @ vectors / values.clamp(min=1e-9).sqrt(), dim=1).float()


def caption_places(encoded: encode.Encoded) -> Tensor:
    """Places (concepts * 3, 192) of every concept in each style, in the order of `Encoded.caption`."""
    num_captions = encoded.null_caption // 2  # the second half are aliases
    embeddings = sentence_embeddings(encoded.text, torch.arange(num_captions))
    trained = encoded.split == data.TRAIN
    return whitened(embeddings, encoded.caption(encoded.concept, encoded.style)[trained])


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


def judge_loss(model: ImageEncoder, x: Tensor, captions: Tensor, places: Tensor) -> Tensor:
    """Cross-entropy of the own caption (n,), an index into `places`, among all of them."""
    scale = model.log_scale.clamp(max=math.log(60.0)).exp()
    return F.cross_entropy(scale * model(x) @ places.T, captions, label_smoothing=0.05)


def learning_rate(iteration: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to 0."""
    falling = 0.5 * (1 + math.cos(math.pi * iteration / args.iterations))
    return args.lr * min(1.0, (iteration + 1) / WARMUP) * falling


# ---- the judge ---------------------------------------------------------------------------------------


class Judge:
    """Scores uint8 pictures (n, 64, 64, 3) with trained weights.

    Raises FileNotFoundError or ValueError in one line.
    """

    def __init__(self, weights: Path = WEIGHTS):
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} does not exist; `python -m examples.emoji.judge` makes it")
        tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
        with safe_open(weights, "pt") as file:
            self.concepts = json.loads(file.metadata()["concepts"])
        self.places = F.normalize(tensors.pop("places"), dim=1)  # (concepts * 3, 192)
        self.data_statistics = tuple(tensors.pop(name).double().numpy() for name in ("mean", "covariance"))
        self.encoder = ImageEncoder().eval().requires_grad_(False)
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
        """For each picture whether its asked caption (n,) is the nearest, and their cosine.

        `retrieval`: among all concepts in the asked style; `style`: among the styles of the asked concept.
        """
        cosines = self.encoder.places(features) @ self.places.T  # (n, concepts * 3)
        concept, style = captions // NUM_STYLES, captions % NUM_STYLES
        cosines = cosines.view(len(cosines), -1, NUM_STYLES)
        rows = torch.arange(len(cosines))
        return {
            "retrieval": cosines[rows, :, style].argmax(1) == concept,
            "style": cosines[rows, concept].argmax(1) == style,
            "clip": cosines[rows, concept, style],
        }

    def figures(self, images: Tensor, captions: Tensor) -> dict[str, float]:
        """retrieval, style, clip and fd_data of pictures with asked captions (n,)."""
        features = self.features(images)
        found = self.scores(features, captions)
        scores = {name: value.double().mean().item() for name, value in found.items()}
        distance = frechet_distance(*feature_statistics(features.numpy()), *self.data_statistics)
        return scores | {"fd_data": distance}

    def distance(self, images: Tensor, others: Tensor) -> float:
        """Frechet distance between two sets of pictures."""
        one, other = (feature_statistics(self.features(part).numpy()) for part in (images, others))
        return frechet_distance(*one, *other)


class EmojiFeatures:
    """The extractor behind `evaluate.py --features emoji`; it reads uint8 pictures (n, 64, 64, 3).

    The probabilities are those of the concepts, whatever the style.
    """

    def __init__(self):
        self._judge = Judge()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        pool, encoder = self._judge.features(images), self._judge.encoder
        scale = encoder.log_scale.clamp(max=math.log(60.0)).exp()
        logits = scale * encoder.places(pool) @ self._judge.places.T
        probabilities = logits.softmax(1).view(len(pool), -1, NUM_STYLES).sum(2)
        return Features(pool, None, probabilities)


def write(model: ImageEncoder, places: Tensor, emoji: data.EmojiData, output: Path) -> None:
    """The weights in fp16 with the captions' places and the training pictures' feature statistics."""
    model.eval()
    with torch.no_grad():
        train = torch.from_numpy(emoji.images[emoji.split == data.TRAIN])
        features = torch.cat([model.features(to_float(batch)) for batch in train.split(64)])
    mean, covariance = feature_statistics(features.numpy())
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
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
            figures = judge.figures(torch.from_numpy(emoji.images)[chosen], captions[chosen])
            found[name] = {key: round(value, 4) for key, value in figures.items()}
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the judge of emoji pictures.")
    parser.add_argument("--data", type=Path, default=data.FOLDER / "emoji.npz")
    parser.add_argument("--encoded", type=Path, default=data.FOLDER / "encoded.safetensors")
    parser.add_argument("--iterations", type=cli.positive_int, default=2_000)
    parser.add_argument("--batch-size", type=cli.positive_int, default=64)
    parser.add_argument("--lr", type=cli.positive, default=2e-3, help="peak; warm-up, then a cosine to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=cli.positive_int, default=200, help="iterations")
    parser.add_argument(
        "--output", type=Path, default=data.FOLDER / "judge.safetensors", help="file to write"
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    emoji, encoded = data.load(args.data), encode.load(args.encoded)
    places = caption_places(encoded)
    chosen = encoded.split == data.TRAIN
    images = torch.from_numpy(emoji.images)[chosen]
    own = encoded.caption(encoded.concept, encoded.style)[chosen]  # each caption has one picture
    model = ImageEncoder().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05, fused=True)
    settings = {name: getattr(args, name) for name in ("batch_size", "lr", "seed")}
    parts = {"model": model, "optimizer": optimizer}
    state = TrainingState(args.output.with_suffix(".training.pt"), settings | {"data": encoded.digest}, parts)
    state.resume()
    began, losses = time.monotonic() - state.seconds, []
    for iteration in range(state.iteration, args.iterations):
        torch.manual_seed(iteration_seed(args.seed, iteration))
        optimizer.param_groups[0]["lr"] = learning_rate(iteration, args)
        batch = torch.randint(len(images), (args.batch_size,))
        loss = judge_loss(model, augmented(to_float(images[batch])), batch, places[own])
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
