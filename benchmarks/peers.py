"""How fast schedules through hooks are beside uncached diffusers and beside cache-dit, in one run.

    python -m benchmarks.peers --model PixArt-Sigma-512 --blocks 4
    python -m benchmarks.peers --model PixArt-Sigma-1024 --precision bf16 --device cuda --output peers.json

All run in diffusers' own PixArt pipeline with DPM-Solver++ and guidance, on the same random weights, prompts
and noise, and take turns (A B A B).

| row | what runs |
|---|---|
| `diffusers` | the pipeline untouched |
| `all` | a schedule that computes everything: what hooks cost |
| `random:X`, `fora:2` | a random share X of the cells is reused, or every other step |
| `cache-dit` | its DBCache with the steps of fora:2 by its mask; its first block always runs |
| `as cache-dit` | hooks with the cells that cache-dit computes |

cache-dit (`pip install cache-dit`) is left out where it is not installed. `share` is the computed share of
the branches' MACs, `ratio` the measured speed-up over what the MACs promise. The last line is JSON.
"""

import argparse
import logging
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from backbones.hooks import apply_schedule, remove_schedule
from backbones.pixart import PixArt, random_pixart, random_prompts
from backbones.pixart_models import PIXART
from common import cli, devices
from common.columns import aligned
from common.files import check_writable, to_json, write_json
from common.timing import alternating, latency
from router import Schedule
from schedules.baselines import fora_schedule, random_schedule

CFG_SCALE = 4.5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hooks beside uncached diffusers and cache-dit.")
    parser.add_argument("--model", choices=PIXART, default="PixArt-Sigma-512")
    parser.add_argument("--blocks", type=cli.positive_int, default=28, help="of the model (default: all 28)")
    parser.add_argument("--num-sampling-steps", type=cli.positive_int, default=20)
    parser.add_argument("--batch-size", type=cli.positive_int, default=1, help="images (default 1)")
    parser.add_argument("--repeats", type=cli.positive_int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    devices.add_arguments(parser)
    return parser.parse_args()


class Runs:
    """One pipeline, and a request that is always the same."""

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
        from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline  # slow to import

        self.args, known = args, PIXART[args.model]
        self.transformer = random_pixart(args.model, num_layers=args.blocks).to(device, dtype)
        prompts = random_prompts(args.batch_size, known.num_tokens)
        self.pipe = PixArtSigmaPipeline(None, None, None, self.transformer, DPMSolverMultistepScheduler())
        self.pipe.set_progress_bar_config(disable=True)
        states, mask = prompts.batch([*range(args.batch_size), *[args.batch_size] * args.batch_size])
        states, mask = states.to(device, dtype), mask.to(device)
        side = known.pixels // 8
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(args.batch_size, 4, side, side, generator=generator).to(device, dtype)
        n = args.batch_size
        self.request = {
            "prompt_embeds": states[:n], "prompt_attention_mask": mask[:n], "negative_prompt": None,
            "negative_prompt_embeds": states[n:], "negative_prompt_attention_mask": mask[n:],
            "num_inference_steps": args.num_sampling_steps, "guidance_scale": CFG_SCALE,
            "height": known.pixels, "width": known.pixels, "use_resolution_binning": False,
            "output_type": "latent",
        }  # fmt: skip
        model = PixArt(self.transformer, prompts)
        self.branch_macs, self.other_macs = torch.tensor(model.branch_macs), model.other_macs
        model.close()

    def __call__(self) -> Tensor:
        return self.pipe(**self.request, latents=self.noise.clone()).images

    def speedup_macs(self, schedule: Schedule) -> float:
        full = schedule.num_steps * (int(self.branch_macs.sum()) + self.other_macs)
        computed = int((schedule.compute.long() @ self.branch_macs).sum())
        return full / (computed + schedule.num_steps * self.other_macs)

    @contextmanager
    def scheduled(self, schedule: Schedule) -> Iterator[None]:
        apply_schedule(self.pipe, schedule)
        try:
            yield
        finally:
            remove_schedule(self.pipe)

    @contextmanager
    def cache_dit(self, executed: list[bool]) -> Iterator[None]:
        """executed: the steps that compute all blocks, in the order of execution; the others one."""
        import cache_dit  # noqa: F401

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=1e9, max_warmup_steps=1,
            num_inference_steps=len(executed), steps_computation_mask=[int(one) for one in executed],
            steps_computation_policy="static",
        )  # fmt: skip
        cache_dit.enable_cache(self.pipe, cache_config=config)
        try:
            yield
        finally:
            cache_dit.disable_cache(self.pipe)


def schedules(num_steps: int, num_branches: int) -> dict[str, Schedule]:
    everything = Schedule(torch.ones(num_steps, num_branches, dtype=torch.bool))
    size = num_steps, num_branches
    return {
        "all": everything,
        "random:0.375": random_schedule(*size, 0.375, 0),
        "random:0.5": random_schedule(*size, 0.5, 0),
        "fora:2": fora_schedule(*size, 2),
    }


COLUMNS = (
    ("method", lambda row: row["method"]),
    ("share", lambda row: f"{row['share']:.3f}"),
    ("ms", lambda row: f"{row['ms']:,.1f} ({row['ms_least']:,.1f} to {row['ms_most']:,.1f})"),
    ("speed-up", lambda row: f"{row['speedup_latency']:.3f}x"),
    ("by MACs", lambda row: f"{row['speedup_macs']:.3f}x"),
    ("ratio", lambda row: f"{row['ratio']:.3f}"),
)


def main(args: argparse.Namespace) -> None:
    device = devices.choose_device(args.device)
    precision, dtype = devices.set_precision(args.precision, device)
    if args.output:
        check_writable(args.output, [".json"])
    runs, num_steps = Runs(args, device, dtype), args.num_sampling_steps
    chosen = schedules(num_steps, len(runs.branch_macs))

    def under(context: Callable) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with context():
                return runs()

        return run

    calls: dict[str, Callable[[], Tensor]] = {"diffusers": runs}
    promised = {"diffusers": 1.0}
    for name, schedule in chosen.items():
        calls[name] = under(lambda schedule=schedule: runs.scheduled(schedule))
        promised[name] = runs.speedup_macs(schedule)
    try:
        import cache_dit  # noqa: F401
    except ImportError:
        print("cache-dit is not installed and left out: pip install cache-dit")
    else:
        logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
        rows = chosen["fora:2"].compute[:, 0].flip(0).tolist()
        calls["cache-dit"] = under(lambda: runs.cache_dit(rows))
        blocks = torch.zeros(num_steps, args.blocks, dtype=torch.bool)
        blocks[torch.tensor(rows).flip(0)] = True
        blocks[:, 0] = True  # its first block
        own = Schedule(blocks.repeat_interleave(3, dim=1))
        calls["as cache-dit"] = under(lambda: runs.scheduled(own))
        promised["cache-dit"] = promised["as cache-dit"] = runs.speedup_macs(own)
    for run in calls.values():
        run()  # the warm-up
    seconds = dict(
        zip(calls, alternating(list(calls.values()), args.repeats, device, warm_up=0), strict=True)
    )
    total = int(runs.branch_macs.sum()) + runs.other_macs
    rows = []
    for name, times in seconds.items():
        row = {"method": name} | latency(times, seconds["diffusers"]) | {"speedup_macs": promised[name]}
        row["share"] = (total / promised[name] - runs.other_macs) / int(runs.branch_macs.sum())
        row["ratio"] = row["speedup_latency"] / row["speedup_macs"]
        rows.append(row)
    print(aligned(rows, COLUMNS))
    result = {
        "model": args.model, "blocks": args.blocks, "num_steps": num_steps, "batch_size": args.batch_size,
        "cfg_scale": CFG_SCALE, "repeats": args.repeats, "precision": precision,
        "hardware": devices.hardware(device), "torch": torch.__version__,
        "median_ms": statistics.median(1000 * one for one in seconds["diffusers"]), "rows": rows,
    }  # fmt: skip
    if args.output:
        write_json(args.output, result)
    print(to_json(result))


if __name__ == "__main__":
    cli.run(main, parse_args())
