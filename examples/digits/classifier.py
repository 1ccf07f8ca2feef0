"""The judge of digit images: a small CNN, its accuracy, and the Frechet distance between its features.

    python -m examples.digits.classifier          # trains it, prints its figures, writes its weights

It is trained on four fifths of the digits and tested on the rest. The Frechet distance ("digits-FID")
compares the penultimate features of samples with those of the whole data set.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from common import cli
from common.files import replacing
from examples.digits.data import NUM_CLASSES, digit_images, train_test_indices
from metrics.checks import require_finite
from metrics.features import Features
from metrics.frechet import feature_statistics, frechet_distance

WEIGHTS = Path(__file__).parent / "classifier.safetensors"


class DigitClassifier(nn.Module):
    """Three convolutions and two linear layers on (N, 1, 8, 8) images in [-1, 1]."""

    def __init__(self, width: int = 32, num_features: int = 64):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (N, 2 * width, 4, 4)
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (N, 2 * width, 2, 2)
        )
        self.penultimate = nn.Linear(8 * width, num_features)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(num_features, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (N, num_features)."""
        return F.relu(self.penultimate(self.conv(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10)."""
        return self.head(self.dropout(self.features(images)))


def load_classifier(weights: Path = WEIGHTS) -> DigitClassifier:
    classifier = DigitClassifier().eval().requires_grad_(False)
    classifier.load_state_dict(load_file(weights))
    return classifier


def _as_pictures(images: Tensor) -> Tensor:
    """Clamp to [-1, 1], as a picture would. Raises ValueError for values that are not finite."""
    require_finite(images, "samples")
    return images.cpu().clamp(-1, 1)


class Judge:
    """Scores samples (n, 1, 8, 8) in [-1, 1] with the committed classifier.

    Raises ValueError for samples that are not finite.
    """

    compared = ("digits_fid",)  # on as many samples: fewer samples give a larger FID

    def __init__(self, weights: Path = WEIGHTS):
        self.classifier = load_classifier(weights)
        self._data = self.statistics(digit_images()[0])

    @torch.no_grad()
    def features(self, samples: Tensor, _images: Tensor | None = None) -> Tensor:
        """Features (n, 64) of samples; their uint8 images are not needed."""
        return self.classifier.features(_as_pictures(samples))

    @torch.no_grad()
    def figures(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        """digits_fid and accuracy of samples with these features."""
        right = self.classifier.head(features).argmax(1) == labels.cpu()
        distance = frechet_distance(*feature_statistics(features.numpy()), *self._data)
        return {"digits_fid": distance, "accuracy": right.double().mean().item()}

    def statistics(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the images' features."""
        return feature_statistics(self.features(images).numpy())

    def digits_fid(self, images: Tensor) -> float:
        """Frechet distance to the whole data set."""
        return frechet_distance(*self.statistics(images), *self._data)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images that the classifier recognises as the label asked for."""
        return self.figures(self.features(images), labels)["accuracy"]


class DigitsFeatures:
    """The extractor behind `evaluate.py --features digits`; it reads uint8 images (n, 8, 8, 1)."""

    def __init__(self):
        self._classifier = load_classifier()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        if images.shape[1:] != (8, 8, 1):
            raise ValueError(f"--features digits reads 8 x 8 grey images, not {tuple(images.shape[1:])}")
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        pool = self._classifier.features(x)
        return Features(pool, None, self._classifier.head(pool).softmax(dim=1))


def shifted(images: Tensor) -> Tensor:
    """Each image (N, 1, 8, 8) moved by up to one pixel in each direction; the border is background, -1."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    offsets = torch.randint(3, (len(images), 2))
    return torch.stack(
        [image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, offsets.tolist(), strict=True)]
    )


def train(
    images: Tensor, labels: Tensor, epochs: int, batch_size: int = 64, lr: float = 2e-3
) -> DigitClassifier:
    """Train a classifier: AdamW, cosine learning rate, randomly shifted images, label smoothing."""
    model = DigitClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in tqdm(range(epochs), desc="classifier", disable=None):
        for batch in torch.randperm(len(images)).split(batch_size):
            loss = F.cross_entropy(model(shifted(images[batch])), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        scheduler.step()
    return model.eval()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the digits classifier.")
    parser.add_argument("--epochs", type=cli.positive_int, default=60, help="default: 60")
    parser.add_argument("--seed", type=cli.seed, default=0, help="default: 0")
    parser.add_argument(
        "--output", type=Path, default=WEIGHTS, help="file of the weights; default: the committed one"
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    images, labels = digit_images()
    train_indices, test_indices = train_test_indices()
    model = train(images[train_indices], labels[train_indices], args.epochs)
    with replacing(args.output) as temporary:
        save_file(model.state_dict(), temporary)
    judge = Judge(args.output)
    print(f"test accuracy {100 * judge.accuracy(images[test_indices], labels[test_indices]):.2f} %")
    parts = {"the test fifth and the rest": (train_indices, test_indices)}
    parts["two random halves"] = torch.randperm(len(images)).tensor_split(2)
    for name, (one, other) in parts.items():
        distance = frechet_distance(*judge.statistics(images[one]), *judge.statistics(images[other]))
        print(f"Frechet distance between {name}: {distance:.3f}")


if __name__ == "__main__":
    cli.run(main, parse_args())
