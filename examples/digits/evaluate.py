"""How good the uncached digits model is: digits-FID, accuracy and closeness to the training images.

    python -m examples.digits.evaluate            # 5,000 samples a row, some minutes on two cores

`nearest` is the median Euclidean distance, over 64 pixels, from a sample to the closest image of the data.
The first line shows the same distance among the images of the data. A model that repeats its training images
would lie far below that.
"""

import argparse

import torch
from torch import Tensor

from backbones.loading import load_model
from common import cli
from diffusion import create_diffusion
from examples.digits import MODEL
from examples.digits.classifier import Judge
from examples.digits.data import digit_images
from metrics.checks import require_finite
from sampling.loop import Trajectory, generate_seeded


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate the uncached digits model.")
    parser.add_argument("--ckpt", help="weights of the model; default: the committed ones")
    parser.add_argument(
        "--samples", type=cli.positive_int, default=5000, help="samples for each row; default: 5000"
    )
    parser.add_argument(
        "--steps", type=cli.positive_int, nargs="+", default=[20, 10, 5], help="default: 20 10 5"
    )
    parser.add_argument(
        "--cfg-scales", type=cli.finite, nargs="+", default=[1.0, 1.5], help="1 = no guidance; default: 1 1.5"
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="default: 0")
    return parser.parse_args()


def nearest_distances(samples: Tensor, data: Tensor, exclude_self: bool = False) -> Tensor:
    """Euclidean distance (n,) from each sample (n, 1, 8, 8) to the closest image of `data`.

    exclude_self: samples and data are the same images; leave out the distance 0 of each to itself.
    """
    require_finite(samples, "samples")
    distances = torch.cdist(samples.flatten(1), data.flatten(1))
    if exclude_self:
        distances.fill_diagonal_(torch.inf)
    return distances.min(dim=1).values


def main(args: argparse.Namespace) -> None:
    model, judge, (images, _) = load_model(MODEL, args.ckpt), Judge(), digit_images()
    print(f"weights: {model.source}")
    labels = torch.arange(args.samples) % model.num_classes
    among_data = nearest_distances(images, images, exclude_self=True).median().item()
    print(f"{args.samples} samples, seed {args.seed}; nearest among the images of the data: {among_data:.2f}")
    print("steps  guidance  digits-FID  accuracy %  nearest")
    for cfg_scale in args.cfg_scales:
        for steps in args.steps:
            trajectory = Trajectory(model, create_diffusion(str(steps)), cfg_scale)
            x_0 = generate_seeded(trajectory, labels, args.seed, 250, progress=True)
            nearest = nearest_distances(x_0.clamp(-1, 1), images).median().item()
            accuracy = 100 * judge.accuracy(x_0, labels)
            print(
                f"{steps:5}  {cfg_scale:8g}  {judge.digits_fid(x_0):10.3f}  {accuracy:10.2f}  {nearest:7.2f}"
            )


if __name__ == "__main__":
    cli.run(main, parse_args())
