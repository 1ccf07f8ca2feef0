"""Sample images, uncached or with a trained router, and say what it cost.

    python sample.py --model DiT-XL/2 --vae ema --image-size 256 --num-classes 1000 --cfg-scale 4 \\
        --num-sampling-steps 10 --seed 42 --accelerate-method dynamiclayer --ddim-sample --path ROUTER \\
        --thres 0.1
    python sample.py --num-sampling-steps 10 --accelerate-method dynamiclayer --path ROUTER --compare

`--path` is a router file or a folder that holds one (a training's results folder); `schedules/table.py`
lists the other values of `--accelerate-method`. `--compare` draws the same noise with and without the method.
The latency is that of the denoising loop of one batch, without decoding.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import execution
from backbones import settings as model_settings
from backbones.contract import Backbone
from backbones.denoiser import check_guidance, halves
from backbones.loading import is_latent, is_text_model
from backbones.settings import ModelSettings
from common import cli, devices
from common.files import check_writable, replacing
from common.pictures import branch_types, comparison, sheet
from common.timing import alternating
from execution import settings as execution_settings
from execution.settings import ExecutionSettings
from metrics.paired import mse, psnr
from router import Schedule
from sampling import settings as sampling_settings
from sampling.decoding import decode
from sampling.loop import Trajectory, generate_seeded
from sampling.settings import SamplingSettings
from schedules import methods
from schedules import settings as method_settings
from schedules.dynamic import Rule
from schedules.settings import MethodSettings

PUBLISHED_LABELS = [207, 992, 387, 974, 142, 979, 417, 279]  # HarmoniCa's; DiT's have 360 and 88


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample images, uncached or with a router.")
    model_settings.add_arguments(parser, with_vae=True)
    sampling = sampling_settings.add_arguments(
        parser, SamplingSettings(cfg_scale=4.0), batch_help="images at once (default: all)"
    )
    sampling.add_argument("--labels", type=int, nargs="+", help="one image per label")
    method_settings.add_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("sample.png"), help="default sample.png")
    output.add_argument(
        "--save-latents",
        type=Path,
        metavar="FILE.npz",
        help="also write x_0 before decoding, as array 'latents'",
    )
    output.add_argument(
        "--compare",
        action="store_true",
        help="draw uncached samples of the same noise too, shown above; print MSE and PSNR",
    )
    output.add_argument(
        "--repeats",
        type=cli.non_negative_int,
        default=3,
        help="timed runs after the warm-up; 0: no timing (default 3)",
    )
    execution_settings.add_arguments(parser)
    args = cli.parse(parser)
    sampling_settings.check_arguments(parser, args)
    method_settings.check_arguments(parser, args)
    by_prompt = cli.Unread(("labels",), lambda args: is_text_model(args.model), "with --model {model}")
    model_settings.check_arguments(parser, args, [by_prompt])
    if args.compare and args.accelerate_method == "none":
        parser.error("--compare needs a caching method; add --accelerate-method dynamiclayer --path ROUTER")
    return args


def describe_schedule(schedule: Schedule | Rule, model: Backbone, passes: int) -> str:
    """Two lines on what a schedule computes and saves, or what a rule has done. passes: 2 under guidance."""
    counts, table = [], schedule.computed()
    for kind in branch_types(model.branches):
        columns = [i for i, name in enumerate(model.branches) if name.endswith(f".{kind}")]
        cells = table[:, columns]
        counts.append(f"{kind} {_number(cells.sum())} / {cells.numel()}")
    full = schedule.macs(model) * schedule.speedup_macs(model)
    return (
        f"schedule ({schedule.source}): {_number(table.sum())} / {table.numel()} branches computed "
        f"({', '.join(counts)}), CUR {100 * schedule.cur:.2f} %\n"
        f"MACs per image: {passes * schedule.macs(model) / 1e9:,.3f} G of {passes * full / 1e9:,.3f} G, "
        f"theoretical speed-up {schedule.speedup_macs(model):.3f}x"
    )


def _number(cells: Tensor) -> str:
    """A sum of cells; with a decimal where samples differ in what they compute."""
    return f"{cells:.1f}".removesuffix(".0")


def choose_labels(given: list[int] | None, model: Backbone, prompted: bool = False) -> Tensor:
    """The labels (n,) of the images, or all prompts by number. Raises ValueError for an unknown label."""
    usual = PUBLISHED_LABELS if model.num_classes == 1000 else range(min(10, model.num_classes))
    labels = range(model.num_classes) if prompted else given or usual
    for label in labels:
        if not 0 <= label < model.num_classes:
            raise ValueError(f"--labels {label} is outside 0 .. {model.num_classes - 1}, the model's classes")
    return torch.tensor(list(labels))


def report_latency(
    draw: Callable[..., Tensor],
    labels: Tensor,
    chosen: dict[str, Trajectory],
    repeats: int,
    device: torch.device,
) -> None:
    """Time one batch of every method in turn (A B A B); drawing the images has been the warm-up."""
    batches = [partial(draw, trajectory, labels) for trajectory in chosen.values()]
    seconds = dict(zip(chosen, alternating(batches, repeats, device, warm_up=0), strict=True))
    for name, times in seconds.items():
        middle, low, high = (1000 * f(times) for f in (statistics.median, min, max))
        print(
            f"latency {name}: {middle:,.1f} ms per batch of {len(labels)} "
            f"(median of {repeats} after a warm-up, {low:,.1f} to {high:,.1f})"
        )
    if len(seconds) == 2:
        uncached, faster = (statistics.median(times) for times in seconds.values())
        print(f"measured speed-up {uncached / faster:.3f}x")


def picture_suffixes() -> list[str]:
    Image.init()
    return sorted(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE)


def main(args: argparse.Namespace) -> None:
    cli.show_notes(args)
    sampling, executing = SamplingSettings.from_arguments(args), ExecutionSettings.from_arguments(args)
    device = devices.choose_device(executing.device)
    precision, dtype = devices.set_precision(executing.precision, device)
    check_writable(args.output, picture_suffixes())
    if args.save_latents:
        check_writable(args.save_latents, [".npz"])
    executing = executing.on(device)
    if args.random_weights:
        print(cli.RANDOM_WEIGHTS)
    model, vae_config = ModelSettings.from_arguments(args).load(device, dtype)
    if model.source:
        print(f"weights: {model.source}")
    check_guidance(model, sampling.cfg_scale)
    method = methods.load_method(MethodSettings.from_arguments(args), model, sampling, args.model)
    for note in method.notes:
        print(note)
    labels = choose_labels(args.labels, model, prompted=is_text_model(args.model))
    vae = vae_config and vae_config.load(device)
    if vae is None and is_latent(model):
        print("no VAE: the picture is a preview of the latents' first three channels")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    default = "" if args.sampler or args.ddim_sample or args.p_sample else " (the default)"
    print(f"{args.model}, {parameters:,.2f} M parameters, {precision} on {devices.hardware(device)}")
    print(
        f"{sampling.sampler.upper()}{default}, {method.diffusion.num_timesteps} steps, guidance "
        f"{sampling.cfg_scale:g}, seed {sampling.seed}"
    )
    passes = halves(model, sampling.cfg_scale)
    if method.schedule is not None and not method.dynamic:
        print(describe_schedule(method.schedule, model, passes))

    batch_size = sampling.batch_size or len(labels)
    run = execution.prepare(executing, model, device)

    def draw(trajectory: Trajectory, labels: Tensor, progress: bool = False) -> Tensor:
        return generate_seeded(trajectory, labels, sampling.seed, batch_size, progress, sample=run)

    own_name = "uncached" if method.name == "none" else "cached" if method.schedule else method.name
    chosen = {own_name: method.trajectory(model, sampling)}
    if args.compare:
        chosen = {"uncached": methods.uncached(model, sampling).trajectory(model, sampling)} | chosen
    x_0 = {name: draw(one, labels, progress=True) for name, one in chosen.items()}
    if method.dynamic:
        print(describe_schedule(method.schedule, model, passes))
    images = {name: decode(latents, vae) for name, latents in x_0.items()}
    caption = f"{own_name}, same noise"
    if method.schedule is not None:  # before timed runs add to what a rule has counted
        caption += f": CUR {100 * method.schedule.cur:.1f} %, {method.schedule.source}"
    if args.repeats:
        report_latency(draw, labels[:batch_size], chosen, args.repeats, device)
    if args.compare:
        error = mse(x_0[own_name], x_0["uncached"])
        ratio = psnr(images[own_name], images["uncached"])
        print(f"{own_name} against uncached: MSE of x_0 {error:.3e}, PSNR of the images {ratio:.2f} dB")
    save(args, x_0, images, caption)


def save(args: argparse.Namespace, x_0: dict[str, Tensor], images: dict[str, Tensor], caption: str) -> None:
    """Write the picture, of the last images or of both under a caption, and the latents where asked."""
    *_, own_name = x_0
    if args.compare:
        picture = comparison([("uncached", images["uncached"]), (caption, images[own_name])])
    else:
        picture = sheet(images[own_name])
    with replacing(args.output) as temporary:
        picture.save(temporary)
    print(f"wrote {args.output}")
    if args.save_latents:
        with replacing(args.save_latents) as temporary:
            np.savez(temporary, latents=x_0[own_name].cpu().numpy())
        print(f"wrote {args.save_latents}")


if __name__ == "__main__":
    cli.run(main, parse_args())
