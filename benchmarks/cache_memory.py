"""What a store of branch outputs takes: computed for every model and size, measured on one.

    python -m benchmarks.cache_memory
    python -m benchmarks.cache_memory --measure PixArt-Sigma-2048 --precision bf16 --output memory.json

The first prints a table in which every branch is kept, as FORA does: the most that a schedule takes with one
output a branch. The second takes two steps through the hooks with random weights: one computes and stores
every branch, the other reuses them all. It compares the bytes stored with those of the formula. The last line
is JSON.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from backbones.families import find_branches
from backbones.hooks import scheduled, summary
from backbones.pixart import PixArt, random_pixart, random_prompts
from backbones.pixart_models import PIXART
from common import cli, devices
from common.columns import markdown
from common.files import check_writable, to_json, write_json
from common.timing import peak_memory, reset_peak_memory, timed
from router import Schedule
from schedules.baselines import fora_schedule

DIT = {"DiT-XL/2 256": 256, "DiT-XL/2 512": 512}  # pixels
SIZES = (torch.float16, torch.float32)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the stored branch outputs of a model take.")
    parser.add_argument("--measure", choices=PIXART, help="take two steps of this model, with random weights")
    parser.add_argument("--blocks", type=cli.positive_int, default=28, help="of it (default: all 28)")
    parser.add_argument(
        "--rows", type=cli.positive_int, default=2, help="of the batch; a guided image has 2 (default 2)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    devices.add_arguments(parser)
    return parser.parse_args()


def on_meta(name: str) -> nn.Module:
    """A transformer of the table without its weights."""
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel  # slow to import

    with torch.device("meta"):
        if name in DIT:
            return DiTTransformer2DModel(out_channels=8, sample_size=DIT[name] // 8)
        return PixArtTransformer2DModel(**PIXART[name].config())


def tokens_and_width(transformer: nn.Module) -> tuple[int, int]:
    """Of a branch's output for one sample."""
    config = transformer.config
    tokens = (config.sample_size // config.patch_size) ** 2
    return tokens, config.num_attention_heads * config.attention_head_dim


def stored_bytes(transformer: nn.Module, schedule: Schedule, rows: int, dtype: torch.dtype) -> int:
    """The most bytes that a schedule holds at once for a batch of `rows`."""
    tokens, width = tokens_and_width(transformer)
    return schedule.stored_outputs() * rows * tokens * width * dtype.itemsize


def table(rows: int) -> list[list[str]]:
    """A line for each model and size, as `docs/diffusers.md` shows them."""
    lines = [["model", "tokens", "branches", "fp16, GiB", "fp32, GiB"]]
    for name in (*DIT, *PIXART):
        transformer = on_meta(name)
        branches = len(find_branches(transformer))
        kept = fora_schedule(2, branches, 2)
        taken = [stored_bytes(transformer, kept, rows, dtype) / 2**30 for dtype in SIZES]
        tokens, _ = tokens_and_width(transformer)
        lines.append([name, f"{tokens:,}", str(branches), *(f"{one:.2f}" for one in taken)])
    return lines


def measured(name: str, transformer: nn.Module, rows: int) -> dict:
    """Two steps of a transformer of this name through the hooks; bytes and seconds of both."""
    prompts = random_prompts(rows, PIXART[name].num_tokens)
    model = PixArt(transformer, prompts)
    model.close()
    schedule, device = fora_schedule(2, model.num_branches, 2), model.device
    x = torch.randn(rows, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    x, condition = x.to(device, model.dtype), model.condition(torch.arange(rows), guided=False)
    seconds = []
    reset_peak_memory(device)
    with torch.no_grad(), scheduled(transformer, schedule) as session:
        for timestep in (999.0, 499.0):
            arguments = model._arguments(x, torch.tensor(timestep, device=device), condition)
            output, one = timed(lambda given=arguments: transformer(**given, return_dict=False)[0], device)
            seconds.append(one)
        if not output.isfinite().all():
            raise ValueError(f"{name} gives values that are not finite in {model.dtype}; take fp32")
        counts = summary(session.hooks.transformer())["all"]
    return {
        "model": name, "rows": rows, "dtype": str(model.dtype).removeprefix("torch."), "seed": 0,
        "blocks": len(transformer.transformer_blocks), "tokens": tokens_and_width(transformer)[0],
        "computed": counts["computed"], "reused": counts["reused"],
        "stored_bytes": counts["stored_bytes"],
        "stored_bytes_by_formula": stored_bytes(transformer, schedule, rows, model.dtype),
        "peak_bytes": peak_memory(device), "seconds_computed_step": seconds[0],
        "seconds_reused_step": seconds[1], "hardware": devices.hardware(device), "torch": torch.__version__,
    }  # fmt: skip


def main(args: argparse.Namespace) -> None:
    if args.output:
        check_writable(args.output, [".json"])
    if args.measure is None:
        lines = table(args.rows)
        print(markdown(lines))
        heads, *values = lines
        result = {"rows": args.rows, "models": [dict(zip(heads, line, strict=True)) for line in values]}
    else:
        device = devices.choose_device(args.device)
        _, dtype = devices.set_precision(args.precision, device)
        transformer = random_pixart(args.measure, num_layers=args.blocks).to(dtype=dtype).to(device)
        result = measured(args.measure, transformer, args.rows)
    if args.output:
        write_json(args.output, result)
    print(to_json(result))


if __name__ == "__main__":
    cli.run(main, parse_args())
