"""Measure one method on the digits model against uncached samples of the same noise; prints a row as JSON.

    python -m study.measure --num-sampling-steps 10 --accelerate-method fora --interval 2
    python -m study.measure --num-sampling-steps 10 --accelerate-method dynamiclayer --path ROUTER

Every row of the digits study holds such a line. `speedup_macs` and `speedup_latency` are relative to the
uncached chain; latency is that of the denoising loop for one batch of 16, the median of some repeats in turn
with it.
"""

import argparse
import base64
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from backbones.loading import load_model
from common import cli, devices
from common.files import to_json
from common.identity import weights_fingerprint
from common.timing import alternating
from examples.digits import MODEL
from examples.digits.classifier import Judge
from execution import modes as execution
from metrics.frechet import frechet_distance
from metrics.paired import mse, psnr, ssim
from models import DiT
from objectives import step_errors
from sampling.decoding import decode
from sampling.loop import Sample, Trajectory, generate_seeded, sample
from sampling.seeds import SAMPLING_STREAM, draw_noise, sample_generator
from schedules import methods
from schedules.methods import Method

SHOWN = 10  # samples of every method that the report draws
LATENCY_BATCH, REPEATS = 16, 3


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure one method on the digits model.")
    parser.add_argument("--num-sampling-steps", default="10", help="T, or a respacing (default 10)")
    parser.add_argument("--cfg-scale", type=cli.finite, default=1.0, help="guidance, 1 = off (the default)")
    parser.add_argument("--p-sample", action="store_true", help="DDPM instead of DDIM")
    parser.add_argument("--samples", type=cli.positive_int, default=2000)
    parser.add_argument("--seed", type=cli.seed, default=1234)
    parser.add_argument("--batch-size", type=cli.positive_int, default=250)
    parser.add_argument(
        "--repeats",
        type=cli.non_negative_int,
        default=REPEATS,
        help="timed batches; 0: no latency (default 3)",
    )
    parser.add_argument(
        "--step-errors",
        type=cli.positive_int,
        metavar="N",
        help="on the first N samples, the error of each step that SDT trains on (DDIM only)",
    )
    methods.add_arguments(parser)
    execution.add_arguments(parser)
    args = cli.parse(parser, arguments)
    if args.step_errors and args.p_sample:
        parser.error("--step-errors is of DDIM; leave out --p-sample")
    methods.check_arguments(parser, args)
    args.model = MODEL
    return args


def draw(args: argparse.Namespace, trajectory: Trajectory, run: Sample = sample) -> Tensor:
    """x_0 (n, 1, 8, 8) of samples 0 .. n-1 of the seed, with labels 0 .. 9 in turn."""
    labels = torch.arange(args.samples) % trajectory.backbone.num_classes
    return generate_seeded(trajectory, labels, args.seed, args.batch_size, progress=True, sample=run)


def trajectory_of(args: argparse.Namespace, model: DiT, method: Method) -> Trajectory:
    return method.trajectory(model, args.cfg_scale, sampler_of(args))


def sampler_of(args: argparse.Namespace) -> str:
    return "ddpm" if args.p_sample else "ddim"


def timed_batch(args: argparse.Namespace, *setting) -> Callable[[], Tensor]:
    """What is timed: `draw` of LATENCY_BATCH samples; setting as there."""
    return partial(draw, argparse.Namespace(**vars(args) | {"samples": LATENCY_BATCH}), *setting)


def latencies(batches: list[Callable[[], Tensor]], repeats: int = REPEATS) -> list[float]:
    """Median milliseconds of every batch, taken in turn after a warm-up."""
    return [1000 * statistics.median(own) for own in alternating(batches, repeats, torch.device("cpu"))]


def fidelity(judge: Judge, x_0: Tensor, uncached: Tensor, labels: Tensor) -> dict[str, float]:
    """How far samples are from the data and from the uncached ones of the same noise."""
    return {
        "digits_fid": judge.digits_fid(x_0),
        "fd_uncached": frechet_distance(*judge.statistics(x_0), *judge.statistics(uncached)),
        "accuracy": judge.accuracy(x_0, labels),
        "mse": mse(x_0, uncached),
    }


def compare(
    args: argparse.Namespace, model: DiT, judge: Judge, method: Method, own: Tensor, plain: Tensor
) -> dict:
    """The figures of a row, from its samples and the uncached ones."""
    labels = torch.arange(args.samples) % model.num_classes
    images, plain_images = decode(own), decode(plain)
    num_steps = methods.uncached(args, model).diffusion.num_timesteps
    peak = psnr(images, plain_images)
    own_errors = training_errors(args, model, method) if args.step_errors else {}
    return own_errors | {
        "num_steps": num_steps,
        "executed_steps": method.diffusion.num_timesteps,
        "cur": method.schedule.cur if method.schedule else 0.0,
        "speedup_macs": method.speedup_macs(model, num_steps),
        **fidelity(judge, own, plain, labels),
        "digits_fid_uncached": judge.digits_fid(plain),  # of as many samples: the smaller, the greater
        "psnr": None if peak == float("inf") else peak,  # JSON has no infinity
        "ssim": ssim(images, plain_images).mean().item(),
        "cfg_scale": args.cfg_scale,
        "sampler": sampler_of(args),
        "samples": args.samples,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "weights": weights_fingerprint(model),
        "dtype": "float32",
        "hardware": devices.hardware(torch.device("cpu")),
    }


def training_errors(args: argparse.Namespace, model: DiT, method: Method) -> dict:
    """`step_error`, the mean over steps of `step_errors`, and of eps: what SDT minimises, for any method."""
    labels = torch.arange(args.step_errors) % model.num_classes
    generators = [sample_generator(args.seed, SAMPLING_STREAM, k) for k in range(args.step_errors)]
    of_all, of_eps = step_errors(
        model, method.diffusion, noise=draw_noise(model, generators), labels=labels,
        cfg_scale=args.cfg_scale, schedule=method.schedule,
    )  # fmt: skip
    means = {"step_error": of_all.mean().item(), "step_error_eps": of_eps.mean().item()}
    return means | {"step_errors": of_all.tolist(), "step_errors_eps": of_eps.tolist()}


def pictures(x_0: Tensor) -> str:
    """The first samples as bytes of grey levels (SHOWN * 64), base64."""
    return base64.b64encode(decode(x_0[:SHOWN]).numpy().tobytes()).decode()


def main(args: argparse.Namespace) -> None:
    cli.show_notes(args)
    model, judge = load_model(MODEL), Judge()
    method, plain = methods.load_method(args, model), methods.uncached(args, model)
    own_model = load_model(MODEL)
    run = execution.prepare(args, own_model, torch.device("cpu"))
    setting = trajectory_of(args, own_model, method), run
    plain_trajectory = trajectory_of(args, model, plain)
    uncached, own = draw(args, plain_trajectory), draw(args, *setting)
    row = compare(args, model, judge, method, own, uncached)
    row |= {"quantize": args.quantize, "compile": args.compile, "cache_dtype": args.cache_dtype}
    if args.repeats:
        batches = [timed_batch(args, plain_trajectory), timed_batch(args, *setting)]
        plain_ms, own_ms = latencies(batches, args.repeats)
        row |= {"latency_ms": own_ms, "speedup_latency": plain_ms / own_ms, "latency_batch": LATENCY_BATCH}
    print(to_json(row))


if __name__ == "__main__":
    cli.run(main, parse_args())
