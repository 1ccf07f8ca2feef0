"""Measure one method on the digits model against uncached samples of the same noise; prints a row as JSON.

    python -m study.measure --num-sampling-steps 10 --accelerate-method fora --interval 2
    python -m study.measure --num-sampling-steps 10 --accelerate-method dynamiclayer --path ROUTER

Every row of the digits study holds such a line. `speedup_macs` and `speedup_latency` are relative to the
uncached chain; latency is that of the denoising loop for one batch of 16, the median of some repeats in turn
with it.
"""

import argparse
import base64
import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import execution
from backbones.loading import load_model
from common import cli, devices
from common.files import to_json
from common.identity import weights_fingerprint
from common.timing import alternating
from examples.digits import MODEL
from examples.digits.classifier import Judge
from execution import settings as execution_settings
from execution.settings import ExecutionSettings
from metrics.frechet import frechet_distance
from metrics.paired import mse, psnr, ssim
from models import DiT
from objectives import step_errors
from sampling import settings as sampling_settings
from sampling.decoding import decode
from sampling.loop import Sample, Trajectory, generate_seeded, sample
from sampling.seeds import SAMPLING_STREAM, draw_noise, sample_generator
from sampling.settings import SamplingSettings
from schedules import methods
from schedules import settings as method_settings
from schedules.methods import Method
from schedules.settings import MethodSettings

SHOWN = 10  # samples of every method that the report draws
LATENCY_BATCH, REPEATS = 16, 3


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure one method on the digits model.")
    defaults = SamplingSettings("10", cfg_scale=1.0, seed=1234, batch_size=250)
    sampling = sampling_settings.add_arguments(parser, defaults, "samples at once (default 250)")
    sampling.add_argument("--samples", type=cli.positive_int, default=2000, help="default 2000")
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
        help="also measure, on the first N samples, the error of each step that SDT trains on (DDIM only)",
    )
    method_settings.add_arguments(parser)
    execution_settings.add_arguments(parser, with_device=False)
    args = cli.parse(parser, arguments)
    sampling_settings.check_arguments(parser, args)
    if args.step_errors and SamplingSettings.from_arguments(args).sampler != "ddim":
        parser.error("--step-errors needs DDIM; leave out --p-sample and other samplers")
    method_settings.check_arguments(parser, args)
    return args


@dataclass(frozen=True)
class Measurement:
    """What a row measures: a method, sampled so, on `samples` samples.

    step_errors: number of samples whose errors of each step are measured too; None: none.
    """

    method: MethodSettings = MethodSettings()
    sampling: SamplingSettings = SamplingSettings("10", seed=1234, batch_size=250)
    execution: ExecutionSettings = ExecutionSettings()
    samples: int = 2000
    step_errors: int | None = None

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "Measurement":
        method, sampling = MethodSettings.from_arguments(args), SamplingSettings.from_arguments(args)
        execution = ExecutionSettings.from_arguments(args)
        return cls(method, sampling, execution, args.samples, args.step_errors)

    def load(self, model: DiT) -> Method:
        return methods.load_method(self.method, model, self.sampling, MODEL)

    def uncached(self, model: DiT) -> Method:
        return methods.uncached(model, self.sampling)


def draw(asked: Measurement, trajectory: Trajectory, run: Sample = sample) -> Tensor:
    """x_0 (n, 1, 8, 8) of samples 0 .. n-1 of the seed, with labels 0 .. 9 in turn."""
    labels = torch.arange(asked.samples) % trajectory.backbone.num_classes
    sampling = asked.sampling
    return generate_seeded(trajectory, labels, sampling.seed, sampling.batch_size, progress=True, sample=run)


def timed_batch(asked: Measurement, trajectory: Trajectory, run: Sample = sample) -> Callable[[], Tensor]:
    """What is timed: `draw` of LATENCY_BATCH samples."""
    return partial(draw, dataclasses.replace(asked, samples=LATENCY_BATCH), trajectory, run)


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


def compare(asked: Measurement, model: DiT, judge: Judge, method: Method, own: Tensor, plain: Tensor) -> dict:
    """The figures of a row, from its samples and the uncached ones."""
    labels = torch.arange(asked.samples) % model.num_classes
    images, plain_images = decode(own), decode(plain)
    num_steps = asked.uncached(model).diffusion.num_timesteps
    peak = psnr(images, plain_images)
    own_errors = training_errors(asked, model, method) if asked.step_errors else {}
    return own_errors | {
        "num_steps": num_steps,
        "executed_steps": method.diffusion.num_timesteps,
        "cur": method.schedule.cur if method.schedule else 0.0,
        "speedup_macs": method.speedup_macs(model, num_steps),
        **fidelity(judge, own, plain, labels),
        "digits_fid_uncached": judge.digits_fid(plain),  # on as many samples: fewer samples give a larger FID
        "psnr": None if peak == float("inf") else peak,  # JSON has no infinity
        "ssim": ssim(images, plain_images).mean().item(),
        "cfg_scale": asked.sampling.cfg_scale,
        "sampler": asked.sampling.sampler,
        "samples": asked.samples,
        "seed": asked.sampling.seed,
        "batch_size": asked.sampling.batch_size,
        "weights": weights_fingerprint(model),
        "dtype": "float32",
        "hardware": devices.hardware(torch.device("cpu")),
    }


def training_errors(asked: Measurement, model: DiT, method: Method) -> dict:
    """`step_error`, the mean over steps of `step_errors`, and the same for eps: what SDT minimises."""
    labels = torch.arange(asked.step_errors) % model.num_classes
    generators = [sample_generator(asked.sampling.seed, SAMPLING_STREAM, k) for k in range(asked.step_errors)]
    of_all, of_eps = step_errors(
        model, method.diffusion, noise=draw_noise(model, generators), labels=labels,
        cfg_scale=asked.sampling.cfg_scale, schedule=method.schedule,
    )  # fmt: skip
    means = {"step_error": of_all.mean().item(), "step_error_eps": of_eps.mean().item()}
    return means | {"step_errors": of_all.tolist(), "step_errors_eps": of_eps.tolist()}


def pictures(x_0: Tensor) -> str:
    """The first samples as bytes of grey levels (SHOWN * 64), base64."""
    return base64.b64encode(decode(x_0[:SHOWN]).numpy().tobytes()).decode()


def main(args: argparse.Namespace) -> None:
    cli.show_notes(args)
    asked = Measurement.from_arguments(args)
    model, judge = load_model(MODEL), Judge()
    method = asked.load(model)
    for note in method.notes:
        print(note)
    own_model = load_model(MODEL)
    run = execution.prepare(asked.execution, own_model, torch.device("cpu"))
    trajectory = method.trajectory(own_model, asked.sampling)
    plain_trajectory = asked.uncached(model).trajectory(model, asked.sampling)
    uncached, own = draw(asked, plain_trajectory), draw(asked, trajectory, run)
    row = compare(asked, model, judge, method, own, uncached)
    row |= {name: getattr(asked.execution, name) for name in ("quantize", "compile", "cache_dtype")}
    if args.repeats:
        batches = [timed_batch(asked, plain_trajectory), timed_batch(asked, trajectory, run)]
        plain_ms, own_ms = latencies(batches, args.repeats)
        row |= {"latency_ms": own_ms, "speedup_latency": plain_ms / own_ms, "latency_batch": LATENCY_BATCH}
    print(to_json(row))


if __name__ == "__main__":
    cli.run(main, parse_args())
