"""Measure one method on an example's model against uncached samples of the same noise; prints a row as JSON.

    python -m study.measure --num-sampling-steps 10 --accelerate-method fora --interval 2
    python -m study.measure --num-sampling-steps 10 --accelerate-method dynamiclayer --path ROUTER
    python -m study.measure --example emoji --accelerate-method fora --interval 2

Every row of a study holds such a line. `speedup_macs` and `speedup_latency` are relative to the
uncached chain; latency is that of the denoising loop for one batch of 16, the median of some repeats in turn
with it.
"""

import argparse
import base64
import dataclasses
import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import execution
from backbones.contract import Backbone
from common import cli, devices
from common.files import to_json
from common.identity import weights_fingerprint
from common.timing import alternating
from execution import settings as execution_settings
from execution.settings import ExecutionSettings
from metrics.frechet import feature_statistics, frechet_distance
from metrics.paired import mse, psnr, ssim
from objectives import step_errors
from sampling import settings as sampling_settings
from sampling.loop import Sample, Trajectory, generate_seeded, sample
from sampling.seeds import SAMPLING_STREAM, draw_noise, sample_generator
from sampling.settings import SamplingSettings
from schedules import methods
from schedules import settings as method_settings
from schedules.methods import Method
from schedules.settings import MethodSettings
from study import subjects
from study.subjects import DIGITS, SUBJECTS, Subject, parts

LATENCY_BATCH, REPEATS = 16, 3


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    example = argparse.ArgumentParser(add_help=False)
    example.add_argument("--example", choices=SUBJECTS, default=DIGITS.name, help="default: digits")
    subject = SUBJECTS[example.parse_known_args(arguments)[0].example]
    parser = argparse.ArgumentParser(
        description="Measure one method on an example's model.", parents=[example]
    )
    size, samples = subject.sampling.batch_size, subject.samples
    sampling = sampling_settings.add_arguments(parser, subject.sampling, f"samples at once (default {size})")
    sampling.add_argument("--samples", type=cli.positive_int, default=samples, help=f"default {samples}")
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
    if args.step_errors and MethodSettings.from_arguments(args).dynamic:
        parser.error(
            f"--step-errors needs a static schedule; {args.accelerate_method} decides while it samples"
        )
    return args


@dataclass(frozen=True)
class Measurement:
    """A measurement: the method, how it samples and executes, and the number of samples.

    step_errors: number of samples whose errors of each step are measured too; None: none. example: a key of
    `SUBJECTS`.
    """

    method: MethodSettings = MethodSettings()
    sampling: SamplingSettings = SamplingSettings("10", seed=1234, batch_size=250)
    execution: ExecutionSettings = ExecutionSettings()
    samples: int = 2000
    step_errors: int | None = None
    example: str = DIGITS.name

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "Measurement":
        method, sampling = MethodSettings.from_arguments(args), SamplingSettings.from_arguments(args)
        execution = ExecutionSettings.from_arguments(args)
        return cls(method, sampling, execution, args.samples, args.step_errors, args.example)

    @property
    def subject(self) -> Subject:
        return SUBJECTS[self.example]

    def load(self, model: Backbone) -> Method:
        return methods.load_method(self.method, model, self.sampling, self.subject.model)

    def uncached(self, model: Backbone) -> Method:
        return methods.uncached(model, self.sampling)


def draw(asked: Measurement, trajectory: Trajectory, run: Sample = sample) -> Tensor:
    """x_0 (n, C, H, W) of samples 0 .. n-1 of the seed, with all labels in turn."""
    labels = torch.arange(asked.samples) % trajectory.backbone.num_classes
    sampling = asked.sampling
    return generate_seeded(trajectory, labels, sampling.seed, sampling.batch_size, progress=True, sample=run)


def timed_batch(asked: Measurement, trajectory: Trajectory, run: Sample = sample) -> Callable[[], Tensor]:
    """The function that is timed: `draw` of LATENCY_BATCH samples."""
    return partial(draw, dataclasses.replace(asked, samples=LATENCY_BATCH), trajectory, run)


def latencies(batches: list[Callable[[], Tensor]], repeats: int = REPEATS) -> list[float]:
    """Median milliseconds of every batch, taken in turn after a warm-up."""
    return [1000 * statistics.median(own) for own in alternating(batches, repeats, torch.device("cpu"))]


def fidelity(
    judge: Any,
    x_0: Tensor,
    uncached: Tensor,
    labels: Tensor,
    images: Tensor | None = None,
    plain_images: Tensor | None = None,
) -> dict[str, float]:
    """How far samples are from the data and from the uncached ones of the same noise.

    judge: an example's, see `common/registry.py`. images, plain_images: the decoded samples, for a judge that
    looks at these.
    """
    own, plain = judge.features(x_0, images), judge.features(uncached, plain_images)
    statistics = [feature_statistics(features.numpy()) for features in (own, plain)]
    found = judge.figures(own, labels)
    of_uncached = judge.figures(plain, labels)
    return (
        found
        | {"fd_uncached": frechet_distance(*statistics[0], *statistics[1]), "mse": mse(x_0, uncached)}
        | {f"{name}_uncached": of_uncached[name] for name in judge.compared}
    )


def compare(
    asked: Measurement, model: Backbone, judge: Any, method: Method, own: Tensor, plain: Tensor
) -> dict:
    """The figures of a row, from its samples and the uncached ones."""
    labels = torch.arange(asked.samples) % model.num_classes
    images, plain_images = asked.subject.decode(own), asked.subject.decode(plain)
    num_steps = asked.uncached(model).diffusion.num_timesteps
    peak = psnr(images, plain_images)
    own_errors = training_errors(asked, model, method) if asked.step_errors else {}
    return own_errors | {
        "num_steps": num_steps,
        "executed_steps": method.diffusion.num_timesteps,
        "cur": method.schedule.cur if method.schedule else 0.0,  # of a rule what it reached, as the speed-up
        "speedup_macs": method.speedup_macs(model, num_steps),
        **fidelity(judge, own, plain, labels, images, plain_images),
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


def training_errors(asked: Measurement, model: Backbone, method: Method) -> dict:
    """`step_error`, the mean over steps of `step_errors`, and the same for eps: what SDT minimises."""
    labels = torch.arange(asked.step_errors) % model.num_classes
    generators = [sample_generator(asked.sampling.seed, SAMPLING_STREAM, k) for k in range(asked.step_errors)]
    of_all, of_eps = step_errors(
        model, method.diffusion, noise=draw_noise(model, generators), labels=labels,
        cfg_scale=asked.sampling.cfg_scale, schedule=method.schedule,
    )  # fmt: skip
    means = {"step_error": of_all.mean().item(), "step_error_eps": of_eps.mean().item()}
    return means | {"step_errors": of_all.tolist(), "step_errors_eps": of_eps.tolist()}


def pictures(subject: Subject, x_0: Tensor) -> str:
    """The first samples in base64: bytes of grey levels, or of colour pictures a WebP of them in a row."""
    images = subject.decode(x_0[: subject.shown]).numpy()
    if images.shape[-1] == 1:
        return base64.b64encode(images.tobytes()).decode()
    file = io.BytesIO()
    Image.fromarray(np.concatenate(list(images), axis=1)).save(file, "webp", quality=85)
    return base64.b64encode(file.getvalue()).decode()


def strip(subject: Subject, pictures: str) -> np.ndarray:
    """The samples (n, H, W), of colour (n, H, W, 3), that `pictures` has written."""
    content = base64.b64decode(pictures)
    if not content.startswith(b"RIFF"):
        return np.frombuffer(content, dtype=np.uint8).reshape(subject.shown, 8, -1)
    row = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return np.stack(np.split(row, row.shape[1] // row.shape[0], axis=1))


def main(args: argparse.Namespace) -> None:
    cli.show_notes(args)
    asked = Measurement.from_arguments(args)
    model, judge = parts(asked.subject)[0], subjects.judge(asked.subject)
    method = asked.load(model)
    for note in method.notes:
        print(note)
    own_model, _ = asked.subject.load()
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
