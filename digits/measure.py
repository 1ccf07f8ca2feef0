"""Measure one method on the digits model against uncached samples of the same noise; prints a row as JSON.

    python -m digits.measure --num-sampling-steps 10 --accelerate-method fora --interval 2
    python -m digits.measure --num-sampling-steps 10 --accelerate-method dynamiclayer --path ROUTER

Every row of the digits study holds such a line. `speedup_macs` and `speedup_latency` are relative to the
uncached chain; latency is the median over the batches of the run, of the denoising loop alone.
"""

import argparse
import base64
import json
import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

import cli
import methods
from digits.classifier import Judge
from methods import Method
from metrics.frechet import frechet_distance
from metrics.paired import mse, psnr, ssim
from models import DiT
from sampling import DIGITS_MODEL, decode, generate_seeded, load_model, timed

SHOWN = 10  # samples of every method that the report draws


@dataclass(frozen=True)
class Drawn:
    """x_0 (n, 1, 8, 8), and what a batch took: the median over full batches."""

    x_0: Tensor
    latency_ms: float


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure one method on the digits model.")
    parser.add_argument("--num-sampling-steps", default="10", help="T, or a respacing (default 10)")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="guidance, 1 = off (the default)")
    parser.add_argument("--p-sample", action="store_true", help="DDPM instead of DDIM")
    parser.add_argument("--samples", type=cli.positive_int, default=2000)
    parser.add_argument("--seed", type=cli.non_negative_int, default=1234)
    parser.add_argument("--batch-size", type=cli.positive_int, default=250)
    methods.add_arguments(parser)
    args = parser.parse_args(arguments)
    methods.check_arguments(parser, args)
    args.model = DIGITS_MODEL
    return args


def draw(args: argparse.Namespace, model: DiT, method: Method) -> Drawn:
    """Samples 0 .. n-1 of the seed, with labels 0 .. 9 in turn."""
    labels, parts, seconds = torch.arange(args.samples) % model.num_classes, [], []
    sampler = "ddpm" if args.p_sample else "ddim"
    for first in tqdm(range(0, args.samples, args.batch_size), desc=method.name, disable=None, leave=False):
        one_batch = partial(
            generate_seeded, model, method.diffusion, labels[first : first + args.batch_size], args.seed,
            first=first, cfg_scale=args.cfg_scale, sampler=sampler, **method.options,
        )  # fmt: skip
        x_0, elapsed = timed(one_batch, torch.device("cpu"))
        parts.append(x_0)
        seconds.append(elapsed)
    full = seconds[: max(1, args.samples // args.batch_size)]
    return Drawn(torch.cat(parts), 1000 * statistics.median(full))


def compare(
    args: argparse.Namespace, model: DiT, judge: Judge, method: Method, own: Drawn, plain: Drawn
) -> dict:
    """The figures of a row."""
    labels = torch.arange(args.samples) % model.num_classes
    images, plain_images = decode(own.x_0), decode(plain.x_0)
    statistics_of = judge.statistics
    num_steps = methods.uncached(args, model).diffusion.num_timesteps
    peak = psnr(images, plain_images)
    return {
        "num_steps": num_steps,
        "executed_steps": method.diffusion.num_timesteps,
        "cur": method.schedule.cur if method.schedule else 0.0,
        "speedup_macs": method.speedup_macs(model, num_steps),
        "speedup_latency": plain.latency_ms / own.latency_ms,
        "latency_ms": own.latency_ms,
        "digits_fid": judge.digits_fid(own.x_0),
        "fd_uncached": frechet_distance(*statistics_of(own.x_0), *statistics_of(plain.x_0)),
        "accuracy": judge.accuracy(own.x_0, labels),
        "mse": mse(own.x_0, plain.x_0),
        "psnr": None if peak == float("inf") else peak,  # JSON has no infinity
        "ssim": ssim(images, plain_images).mean().item(),
        "cfg_scale": args.cfg_scale,
        "sampler": "ddpm" if args.p_sample else "ddim",
        "samples": args.samples,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "dtype": "float32",
        "hardware": cli.hardware(torch.device("cpu")),
    }


def pictures(drawn: Drawn) -> str:
    """The first samples as bytes of grey levels (SHOWN * 64), base64."""
    return base64.b64encode(decode(drawn.x_0[:SHOWN]).numpy().tobytes()).decode()


def main(args: argparse.Namespace) -> None:
    model, judge = load_model(DIGITS_MODEL), Judge()
    method, plain = methods.load_method(args, model), methods.uncached(args, model)
    uncached = draw(args, model, plain)
    own = uncached if method.name == "none" else draw(args, model, method)
    print(json.dumps(compare(args, model, judge, method, own, uncached)))


if __name__ == "__main__":
    cli.run(main, parse_args())
