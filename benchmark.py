"""How fast methods are beside what their MACs promise: a card of what theory says, then timings in turn.

    python benchmark.py --model DiT-B/2 --batch-size 1 --num-sampling-steps 20 --methods fora:2 random:0.375
    python benchmark.py --model DiT-XL/2 --precision bf16 --compile --methods fora:2 ROUTER --output h200.json
    python benchmark.py --model PixArt-Sigma-512 --batch-size 1 --sampler dpm-solver++ --methods fora:2
    python benchmark.py --model DiT-B/2 --batch-size 1 --num-sampling-steps 10 --train

A method is `none`, `fora:2`, `random:0.375`, `fewer-steps:10`, any other value of `--accelerate-method` with
its number or file, or a router file or name alone; --calibrate solves their weights of reuse. `none` is
always measured, and without --compile and --cuda-graph so is `loop`, which calls the bare model step by step.
Weights are random, and a PixArt's prompts too, unless --ckpt or a folder as --model brings them: speed does
not depend on them. Everything takes turns (A B A B); the figures are medians over repeats. The last line is
JSON, `--output` writes it to a file.
`speedup_latency` is the median ratio to the neighbouring run of `none`; `ratio` is what is left of the
speed-up that the MACs promise. With `--train`: an update of router training, and a refresh of lambda, in
forward passes; `--compile` adds the update with compiled branches.
"""

import argparse
import dataclasses
import itertools
from pathlib import Path

import torch

import execution
from backbones import settings as model_settings
from backbones.contract import Backbone
from backbones.denoiser import check_guidance, check_prediction
from backbones.loading import is_text_model, pixels_of, transformer_folder
from backbones.settings import ModelSettings
from benchmarks import training_cost
from benchmarks.sampling_cost import Setting, card, sampling_rows
from common import cli, devices
from common.columns import aligned
from common.files import check_writable, to_json, write_json
from common.timing import peak_memory
from diffusion import SAMPLERS
from execution import settings as execution_settings
from execution.settings import ExecutionSettings
from sampling.settings import SamplingSettings
from schedules import methods
from schedules.methods import Method
from schedules.settings import MethodSettings
from schedules.table import CALIBRATE, CALIBRATED

EXECUTION = ("compile", "cuda_graph", "quantize", "cache_dtype")  # settings that a result holds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Latency, memory and ceilings of caching methods.")
    model_settings.add_arguments(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="METHOD[:VALUE]",
        help="methods to time, each one word such as fora:2; see above",
    )
    CALIBRATE.add_to(parser, f"for every caching method of --methods: {CALIBRATE.help}")
    parser.add_argument(
        "--batch-size", type=cli.positive_int, nargs="+", default=[8],
        help="one or more numbers of images (default 8); with --train a number of trajectories",
    )  # fmt: skip
    parser.add_argument(
        "--num-sampling-steps", nargs="+", default=["20"], help="one or more numbers of steps (default 20)"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="default ddim")
    parser.add_argument("--cfg-scale", type=cli.finite, default=4.0, help="guidance, 1 = off (default 4)")
    parser.add_argument(
        "--repeats", type=cli.positive_int, default=5, help="timed runs after a warm-up (default 5)"
    )
    parser.add_argument("--train", action="store_true", help="time router training instead of sampling")
    parser.add_argument(
        "--cases", nargs="+", choices=(*training_cost.CASES, *training_cost.COMPILED), metavar="CASE",
        help="with --train: what to time beside `forward`; see benchmarks/training_cost.py (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="also write the last line to a file, indented"
    )
    execution_settings.add_arguments(parser)
    args = cli.parse(parser)
    for spec in args.methods:
        try:
            MethodSettings.from_spec(spec)
        except ValueError as error:
            parser.error(str(error))
    if args.cases and not args.train:
        parser.error("--cases requires --train; add it or leave --cases out")
    if args.cases and not args.compile and (compiled := set(training_cost.COMPILED) & set(args.cases)):
        parser.error(f"--cases '{min(compiled)}' needs --compile")
    if args.train:
        unread = [name for name in ("methods", *EXECUTION) if name != "compile" and getattr(args, name)]
        unread += [name for name in ("batch_size", "num_sampling_steps") if len(getattr(args, name)) > 1]
        if unread:
            parser.error(
                f"--train takes one batch size and number of steps, and no --{unread[0].replace('_', '-')}"
            )
    choose_weights(args)
    model_settings.check_arguments(parser, args, UNREAD)
    return args


def choose_weights(args: argparse.Namespace) -> None:
    """Random weights unless some are named, and then as many random prompts as the largest batch needs."""
    named = args.ckpt or transformer_folder(Path(args.model))
    args.random_weights = args.random_weights or not named
    if args.random_weights and is_text_model(args.model) and not (args.prompt or args.prompts):
        args.prompt = [f"prompt {k}" for k in range(max(args.batch_size))]


UNREAD = (
    cli.Unread(
        ("cache_dtype",),
        lambda args: not any(MethodSettings.from_spec(spec).caches for spec in args.methods),
        "without a caching method in --methods",
    ),
    cli.Unread(
        ("calibrate",),
        lambda args: not any(one.reuse == CALIBRATED for one in chosen_methods(args).values()),
        "without a method in --methods that it could calibrate",
    ),
)


def load_methods(args: argparse.Namespace, model: Backbone, sampling: SamplingSettings) -> dict[str, Method]:
    """Every method asked for, `none` first, in one setting of sampling."""
    return {
        name: methods.load_method(settings, model, sampling, args.model)
        for name, settings in chosen_methods(args).items()
    }


def chosen_methods(args: argparse.Namespace) -> dict[str, MethodSettings]:
    """The methods by what their rows are called, `none` first."""
    chosen = {}
    for spec in ["none", *args.methods]:
        given = settings = MethodSettings.from_spec(spec)
        if "calibrate" in args.given:
            settings = given.calibrated(args.calibrate)
        value = spec.removeprefix(f"{given.name}:")
        chosen[spec if settings.name == given.name else f"{settings.name}:{value}"] = settings
    return chosen


COLUMNS = (
    ("method", lambda row: row["method"]),
    ("steps", lambda row: str(row["num_steps"])),
    ("batch", lambda row: str(row["batch_size"])),
    ("ms", lambda row: f"{row['ms']:,.1f} ({row['ms_least']:,.1f} to {row['ms_most']:,.1f})"),
    ("speed-up", lambda row: f"{row['speedup_latency']:.3f}x"),
    ("by MACs", lambda row: f"{row['speedup_macs']:.3f}x"),
    ("ratio", lambda row: f"{row['ratio']:.3f}"),
    ("of ceiling", lambda row: f"{100 * row['of_ceiling']:.0f} %"),
    ("floor ms", lambda row: f"{row['floor_ms']:,.1f}"),
    ("cache MB", lambda row: f"{row['cache_mb']:,.1f}"),
    ("peak MB", lambda row: f"{row['peak_mb']:,.0f}" if "peak_mb" in row else "-"),
)
TRAINING_COLUMNS = (
    ("case", lambda row: row["case"]),
    ("seconds", lambda row: f"{row['trajectory_seconds']:.2f}"),
    ("forwards", lambda row: f"{row['forwards']:.2f}" if "forwards" in row else "-"),
    ("of T trajectories", lambda row: f"{row['of_naive']:.3f}" if "of_naive" in row else "-"),
    ("MB on top", lambda row: f"{row['peak_mb_on_top']:,.0f}"),
)


def print_card(facts: dict, title: str) -> None:
    print(title)
    for name, value in facts.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        shown = ", ".join(f"{kind} {number:,.4g}".strip() for kind, number in parts)
        print(f"  {name.replace('_', ' '):24} {shown}", flush=True)


def main(args: argparse.Namespace) -> None:
    cli.show_notes(args)
    executing = ExecutionSettings.from_arguments(args)
    device = devices.choose_device(executing.device)
    precision, dtype = devices.set_precision(executing.precision, device)
    if args.output:
        check_writable(args.output, [".json"])
    settings = dataclasses.replace(ModelSettings.from_arguments(args), vae="none")  # nothing is decoded
    samplings = [
        SamplingSettings(steps, args.sampler, cfg_scale=args.cfg_scale) for steps in args.num_sampling_steps
    ]
    model, _ = settings.load(device, dtype)
    check_guidance(model, args.cfg_scale)
    for sampling in samplings:
        check_prediction(model, sampling.trajectory(model, sampling.chain(model)).sampler)
    result = {name: getattr(args, name) for name in ("model", "sampler", "cfg_scale", "repeats")}
    result |= {"image_size": pixels_of(model), "weights": model.source or "random"}
    result |= {"precision": precision, "hardware": devices.hardware(device), "torch": torch.__version__}
    title = f"{args.model}, {pixels_of(model)} px, {precision} on {result['hardware']}, batch "
    result["cards"] = {
        batch: card(model, device, batch, args.cfg_scale, executing.quantize) for batch in args.batch_size
    }
    for batch, facts in result["cards"].items():
        print_card(facts, f"{title}{batch}")
    if args.train:
        costs = training_cost.Costs(
            settings, samplings[0], device, dtype, args.batch_size[0], args.repeats, executing.compile,
            args.cases,
        )  # fmt: skip
        rows = training_cost.training_rows(costs)
        print(aligned(rows, TRAINING_COLUMNS), flush=True)
    else:
        executing, rows = executing.on(device), []
        setting = Setting(model, execution.prepare(executing, model, device), executing, device, args.repeats)
        for sampling, batch in itertools.product(samplings, args.batch_size):
            chosen = load_methods(args, model, sampling)
            for note in dict.fromkeys(note for method in chosen.values() for note in method.notes):
                print(note)
            found = sampling_rows(setting, chosen, sampling, batch, result["cards"][batch])
            print(aligned(found, COLUMNS), flush=True)
            rows += found
    result |= {name: getattr(executing, name) for name in EXECUTION}
    result |= {"peak_mb_of_process": peak_memory("cpu") / 2**20, "rows": rows}
    if args.output:
        write_json(args.output, result)
    print(to_json(result))


if __name__ == "__main__":
    cli.run(main, parse_args())
