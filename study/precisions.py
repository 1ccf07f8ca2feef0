"""Caching times precision: quality and latency of every combination on the digits model, in one table.

    python -m study.precisions --path digits-T20-1.96x
    python -m study.precisions --path digits-T20-1.96x --weights int8wo int8 --compile

Rows are weights (fp32, then bf16 or 8 bits, see `execution/quantization.py`), uncached and under a router.
All figures are relative to fp32 uncached: quality is that of samples of the same noise, latencies are those
of one batch, timed alternately. int8 needs torchao, fp8 a GPU. The last line is JSON, `--output` writes it to
a file.
"""

import argparse
import copy
import dataclasses
from functools import partial
from pathlib import Path

import torch

import execution
from backbones.loading import load_model
from common import cli, devices
from common.columns import aligned
from common.files import check_writable, to_json, write_json
from common.timing import alternating, latency
from examples.digits import MODEL
from examples.digits.classifier import Judge
from execution.quantization import QUANTIZATIONS, weight_bytes
from execution.settings import ExecutionSettings
from metrics.paired import psnr
from models import DiT
from router import load_router
from sampling.decoding import decode
from sampling.loop import Sample
from sampling.settings import SamplingSettings
from schedules.methods import load_method
from schedules.settings import MethodSettings
from study.measure import Measurement, draw, fidelity

WEIGHTS = ("fp32", "bf16", *QUANTIZATIONS)
REFERENCE = "fp32", "none"
COLUMNS = (
    ("weights", lambda row: row["weights"]),
    ("method", lambda row: row["method"]),
    ("ms", lambda row: f"{row['ms']:,.1f} ({row['ms_least']:,.1f} to {row['ms_most']:,.1f})"),
    ("speed-up", lambda row: f"{row['speedup_latency']:.3f}x"),
    ("by MACs", lambda row: f"{row['speedup_macs']:.3f}x"),
    ("weights MB", lambda row: f"{row['weights_mb']:.1f}"),
    ("PSNR", lambda row: "-" if row["psnr"] is None else f"{row['psnr']:.1f}"),
    ("MSE", lambda row: f"{row['mse']:.2e}"),
    ("FD to uncached", lambda row: f"{row['fd_uncached']:.2e}"),
    ("digits-FID", lambda row: f"{row['digits_fid']:.3f}"),
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Caching times precision on the digits model.")
    parser.add_argument("--path", required=True, metavar="ROUTER", help="a router file, or a name")
    parser.add_argument(
        "--weights", nargs="+", choices=WEIGHTS, default=["bf16"], help="beside fp32 (default bf16)"
    )
    parser.add_argument("--cfg-scale", type=cli.finite, default=1.0, help="guidance, 1 = off (the default)")
    parser.add_argument("--samples", type=cli.positive_int, default=2048)
    parser.add_argument("--seed", type=cli.seed, default=1234)
    parser.add_argument(
        "--batch-size", type=cli.positive_int, default=64, help="drawn at once; also the batch that is timed"
    )
    parser.add_argument("--repeats", type=cli.positive_int, default=9, help="timed (default 9)")
    parser.add_argument("--compile", action="store_true", help="compile the branches (torch.compile)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the last line, indented")
    args = parser.parse_args(arguments)
    if args.samples % args.batch_size:
        parser.error(f"--samples {args.samples} is no multiple of --batch-size {args.batch_size}")
    args.weights = list(dict.fromkeys(["fp32", *args.weights]))
    return args


def variant(plain: DiT, weights: str, compiled: bool, device: torch.device) -> tuple[DiT, Sample, float]:
    """A copy of the model with these weights, what samples it, and what its weights take in MB."""
    model = copy.deepcopy(plain).to(device, torch.bfloat16 if weights in ("bf16", "fp8") else torch.float32)
    kind = weights if weights in QUANTIZATIONS else None
    megabytes = weight_bytes(model, kind) / 2**20
    settings = ExecutionSettings(compile=compiled, quantize=kind)
    return model, execution.prepare(settings, model, device), megabytes


def main(args: argparse.Namespace) -> None:
    if args.output:
        check_writable(args.output, [".json"])
    device = devices.choose_device(args.device)
    devices.set_precision("fp32", device)
    plain, name = load_model(MODEL), Path(args.path).name.removesuffix(".safetensors")
    num_steps = len(load_router(args.path, MODEL, num_branches=plain.num_branches).logits)
    sampling = SamplingSettings(
        str(num_steps), cfg_scale=args.cfg_scale, seed=args.seed, batch_size=args.batch_size
    )
    specs, chosen = {"none": "none", name: args.path}, {}
    for method, spec in specs.items():
        chosen[method] = load_method(MethodSettings.from_spec(spec), plain, sampling, MODEL)
        for note in chosen[method].notes:
            print(note)
    variants = {weights: variant(plain, weights, args.compile, device) for weights in args.weights}
    runs = {
        (weights, name): (method.trajectory(model, sampling), run)
        for weights, (model, run, _) in variants.items()
        for name, method in chosen.items()
    }

    asked = Measurement(sampling=sampling, samples=args.samples)
    one_batch = dataclasses.replace(asked, samples=args.batch_size)
    x_0 = {key: draw(asked, *run).float().cpu() for key, run in runs.items()}
    batches = [partial(draw, one_batch, *run) for run in runs.values()]
    times = dict(zip(runs, alternating(batches, args.repeats, device), strict=True))
    judge, labels, rows = Judge(), torch.arange(args.samples) % plain.num_classes, []
    for key, own in times.items():
        weights, name = key
        peak = psnr(decode(x_0[key]), decode(x_0[REFERENCE]))
        row = {"weights": weights, "method": name} | latency(own, times[REFERENCE])
        row["speedup_macs"] = chosen[name].speedup_macs(plain, num_steps)
        row |= {"weights_mb": variants[weights][2], "psnr": None if peak == float("inf") else peak}
        rows.append(row | fidelity(judge, x_0[key], x_0[REFERENCE], labels))
    print(aligned(rows, COLUMNS), flush=True)

    asked = ("path", "cfg_scale", "samples", "seed", "batch_size", "repeats", "compile")
    result = {name: getattr(args, name) for name in asked} | {"num_steps": num_steps}
    result |= {"hardware": devices.hardware(device), "torch": torch.__version__, "rows": rows}
    if args.output:
        write_json(args.output, result)
    print(to_json(result))


if __name__ == "__main__":
    cli.run(main, parse_args())
