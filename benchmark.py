"""How fast methods are beside what their MACs promise: a card of what theory says, then timings in turn.

    python benchmark.py --model DiT-B/2 --batch-size 1 --num-sampling-steps 20 --methods fora:2 random:0.375
    python benchmark.py --model DiT-XL/2 --precision bf16 --compile --methods fora:2 ROUTER --output h200.json
    python benchmark.py --model DiT-B/2 --batch-size 1 --num-sampling-steps 10 --train

A method is `none`, `fora:2`, `random:0.375`, `fewer-steps:10`, any other value of `--accelerate-method` with
its number or file, or a router file or name alone; `none` is always measured, and without --compile and
--cuda-graph so is `loop`, which calls `model.forward_with_cfg` step by step. Weights are random: speed does
not depend on them. Everything takes turns (A B A B); the figures are medians over repeats. The last line is
JSON, `--output` writes it to a file.
`speedup_latency` is the median ratio to the neighbouring run of `none`; `ratio` is what is left of the
speed-up that the MACs promise. With `--train`: an update of router training, and a refresh of lambda, in
forward passes; `--compile` adds the update with compiled branches.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from backbones.loading import load_model, pixels_of
from benchmarks import training_cost
from common import cli, devices, registry
from common.columns import print_columns
from common.files import check_writable, to_json, write_json
from common.pictures import branch_types
from common.timing import (
    alternating,
    copy_ceiling,
    latency,
    matmul_ceiling,
    peak_memory,
    reset_peak_memory,
)
from execution import modes as execution
from metrics.paired import mse
from models import DiT
from sampling.decoding import require_finite
from sampling.loop import Sample
from schedules import methods
from schedules.methods import Method

LOOP = "loop"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Latency, memory and ceilings of caching methods.")
    parser.add_argument(
        "--model", default="DiT-XL/2", help=f"DiT-XL/2 and its family, or {' or '.join(registry.presets())}"
    )
    parser.add_argument("--image-size", type=cli.positive_int, help="pixels (default 256)")
    parser.add_argument("--methods", nargs="+", default=[], metavar="METHOD[:VALUE]", help="see above")
    parser.add_argument(
        "--batch-size", type=cli.positive_int, nargs="+", default=[8],
        help="images, one or more (default 8); with --train trajectories, two rows each under guidance",
    )  # fmt: skip
    parser.add_argument("--num-sampling-steps", nargs="+", default=["20"], help="one or more (default 20)")
    parser.add_argument("--cfg-scale", type=cli.finite, default=4.0, help="guidance, 1 = off (default 4)")
    parser.add_argument("--repeats", type=cli.positive_int, default=5, help="after a warm-up (default 5)")
    parser.add_argument("--train", action="store_true", help="router training instead of sampling")
    parser.add_argument(
        "--cases", nargs="+", choices=(*training_cost.CASES, *training_cost.COMPILED), metavar="CASE",
        help="of --train, beside `forward`; see training_cost.py (default: all)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the last line, indented")
    execution.add_arguments(parser)
    devices.add_arguments(parser)
    args = cli.parse(parser)
    for spec in args.methods:
        try:
            methods.spec_flags(spec)
        except ValueError as error:
            parser.error(str(error))
    if args.cases and not args.train:
        parser.error("--cases are of --train; leave them out")
    if args.cases and not args.compile and (compiled := set(training_cost.COMPILED) & set(args.cases)):
        parser.error(f"--cases '{min(compiled)}' needs --compile")
    if args.train:
        unread = [name for name in ("methods", *execution.FLAGS) if name != "compile" and getattr(args, name)]
        unread += [name for name in ("batch_size", "num_sampling_steps") if len(getattr(args, name)) > 1]
        if unread:
            parser.error(
                f"--train takes one batch size and number of steps, and no --{unread[0].replace('_', '-')}"
            )
    cli.note_unread(parser, args, UNREAD)
    return args


UNREAD = (
    cli.Unread(
        ("cache_dtype",),
        lambda args: not any(methods.caches(spec) for spec in args.methods),
        "without a caching method in --methods",
    ),
)


def load_methods(args: argparse.Namespace, model: DiT, num_steps: str) -> dict[str, Method]:
    """Every method asked for, `none` first, at one number of steps."""
    setting = {"model": args.model, "cfg_scale": args.cfg_scale, "num_sampling_steps": num_steps}
    specs = dict.fromkeys(["none", *args.methods])
    return {spec: methods.load_spec(spec, model, p_sample=False, **setting) for spec in specs}


def card(args: argparse.Namespace, model: DiT, device: torch.device, dtype: torch.dtype, batch: int) -> dict:
    """What is known before anything is timed, and the two ceilings, which are measured.

    model: not quantised yet. The matmul ceiling is that of `dtype`, which 8-bit products can surpass.
    """
    rows = batch * (1 if args.cfg_scale == 1 else 2)
    tokens = (model.input_size // model.patch_size) ** 2
    width = model.branch_size // tokens
    kinds = branch_types(model.branches)
    of_branch = [bytes / 2**20 for bytes in execution.branch_weight_bytes(model, args.quantize)]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights_mb": execution.weight_bytes(model, args.quantize) / 2**20,
        "weights_mb_of_branch": dict(zip(kinds, of_branch, strict=False)),
        "gmacs_per_step": rows * (sum(model.branch_macs) + model.other_macs) / 1e9,
        "gmacs_of_branch": {kind: rows * model.branch_macs[k] / 1e9 for k, kind in enumerate(kinds)},
        "branch_output_mb": rows * model.branch_size * dtype.itemsize / 2**20,
        "matmul_gmacs_per_second": matmul_ceiling(device, dtype, rows * tokens, width) / 1e9,
        "copy_gb_per_second": copy_ceiling(device) / 1e9,
    }


def floor_seconds(facts: dict, macs: float, weights_read: float) -> float:
    """No run is shorter: its products at the ceiling, or the weights (bytes) of computed branches read."""
    products = macs / (facts["matmul_gmacs_per_second"] * 1e9)
    return max(products, weights_read / (facts["copy_gb_per_second"] * 1e9))


def sampling_rows(
    args: argparse.Namespace, model: DiT, sample: Sample, device: torch.device, facts: dict,
    num_steps: str, batch: int,
) -> list[dict]:  # fmt: skip
    """One row per method at one batch size and number of steps."""
    chosen = load_methods(args, model, num_steps)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, *model.sample_shape, generator=generator).to(device)
    labels = (torch.arange(batch) % model.num_classes).to(device)

    def runner(method: Method) -> Callable[[], Tensor]:
        trajectory = method.trajectory(model, args.cfg_scale)
        return lambda: sample(trajectory, labels, noise)

    runs = {name: runner(method) for name, method in chosen.items()}
    if not args.compile and not args.cuda_graph:
        plain = chosen["none"].diffusion
        runs[LOOP] = lambda: training_cost.plain_loop(model, plain, labels, noise, args.cfg_scale)
    x_0, peaks = {}, {}
    for name, run in runs.items():  # the warm-up, which captures where it does
        reset_peak_memory(device)
        x_0[name] = run()
        require_finite(x_0[name], what=f"x_0 of {name}")
        peaks[name] = peak_memory(device)
    times = dict(zip(runs, alternating(list(runs.values()), args.repeats, device, warm_up=0), strict=True))
    passes, rows = 1 if args.cfg_scale == 1 else 2, []
    weights = torch.tensor(execution.branch_weight_bytes(model, args.quantize), dtype=torch.float64)
    for name in runs:
        method = chosen.get(name, chosen["none"])
        schedule, steps = method.schedule, method.diffusion.num_timesteps
        full = steps * (sum(model.branch_macs) + model.other_macs)
        macs = batch * passes * (full if schedule is None else schedule.macs(model))
        seconds = statistics.median(times[name])
        row = {"method": name, "num_steps": steps, "batch_size": batch}
        row |= latency(times[name], times["none"])
        row["speedup_macs"] = method.speedup_macs(model, chosen["none"].diffusion.num_timesteps)
        row["ratio"] = row["speedup_latency"] / row["speedup_macs"]
        row["of_ceiling"] = macs / seconds / (facts["matmul_gmacs_per_second"] * 1e9)
        read = steps * weights.sum() if schedule is None else (schedule.compute.double() @ weights).sum()
        row["floor_ms"] = 1000 * floor_seconds(facts, macs, read.item())
        row["cache_mb"] = cache_bytes(args, model, method, batch * passes) / 2**20
        if device.type == "cuda":  # of a process on a CPU it says nothing about one method
            row["peak_mb"] = peaks[name] / 2**20
        rows.append(row)
    if LOOP in x_0:
        rows[0]["mse_to_loop"] = mse(x_0["none"], x_0[LOOP])
    return rows


def cache_bytes(args: argparse.Namespace, model: DiT, method: Method, rows: int) -> int:
    """The most that stored branch outputs take at once."""
    if method.schedule is None:
        return 0
    dtype = execution.CACHE_DTYPES.get(args.cache_dtype, next(model.parameters()).dtype)
    return method.schedule.stored_outputs() * rows * model.branch_size * dtype.itemsize


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
    device = devices.choose_device(args.device)
    precision, dtype = devices.set_precision(args.precision, device)
    if args.output:
        check_writable(args.output, [".json"])
    model = load_model(
        args.model, image_size=args.image_size, device=device, dtype=dtype, random_weights=True
    )
    result = {name: getattr(args, name) for name in ("model", "cfg_scale", "repeats")}
    result["image_size"] = pixels_of(model)
    result |= {"precision": precision, "hardware": devices.hardware(device), "torch": torch.__version__}
    title = f"{args.model}, {pixels_of(model)} px, {precision} on {result['hardware']}, batch "
    result["cards"] = {batch: card(args, model, device, dtype, batch) for batch in args.batch_size}
    for batch, facts in result["cards"].items():
        print_card(facts, f"{title}{batch}")
    if args.train:
        rows = training_cost.training_rows(args, device, dtype)
        print_columns(rows, TRAINING_COLUMNS)
    else:
        sample, rows = execution.prepare(args, model, device), []
        for num_steps, batch in itertools.product(args.num_sampling_steps, args.batch_size):
            setting = device, result["cards"][batch], num_steps, batch
            found = sampling_rows(args, model, sample, *setting)
            print_columns(found, COLUMNS)
            rows += found
    result |= {name: getattr(args, name) for name in execution.FLAGS}  # as they took effect
    result |= {"peak_mb_of_process": peak_memory("cpu") / 2**20, "rows": rows}
    if args.output:
        write_json(args.output, result)
    print(to_json(result))


if __name__ == "__main__":
    cli.run(main, parse_args())
