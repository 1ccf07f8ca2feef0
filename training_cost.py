"""What one training trajectory costs: processor time and memory, HarmoniCa's beside end-to-end.

    python training_cost.py --model DiT-S/4 --num-sampling-steps 12 --batch-size 2

Four rows, each in a process of its own: the uncached reference alone, a trajectory of step-wise denoising
training (SDT), and one update of end-to-end training at half of the MACs (FORA's schedule), with activations
recomputed and with all of them kept. Speed does not depend on weights, so they are random. `kept_mb` is what
the computed outputs take between steps, by their number; `peak_mb` is what the process needed on top of the
model. For a CPU; the last line is JSON.
"""

import argparse
import json
import multiprocessing
import os
import time

import torch

import cli
from baselines import fora_schedule
from cache import GatedCache
from diffusion import create_diffusion
from objectives import Paired, train_trajectory
from router import Router
from sampling import load_model

MODES = ("reference", "sdt", "end-to-end", "end-to-end, activations kept")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of one training trajectory, on a CPU.")
    parser.add_argument("--model", default="DiT-S/4", help="DiT-XL/2 and its family, or DiT-digits/2")
    parser.add_argument("--image-size", type=cli.positive_int, help="pixels (default 256)")
    parser.add_argument("--num-sampling-steps", default="12", help="T (default 12)")
    parser.add_argument(
        "--batch-size", type=cli.positive_int, default=2, help="trajectories at once (default 2)"
    )
    parser.add_argument("--cfg-scale", type=cli.finite, default=1.5, help="guidance, 1 = off (default 1.5)")
    return parser.parse_args()


def measure(args: argparse.Namespace, mode: str) -> dict:
    """One row, in this process: memory of the first run, time of the second."""
    torch.set_num_threads(1)
    model = load_model(args.model, image_size=args.image_size, random_weights=True)
    diffusion = create_diffusion(args.num_sampling_steps, learn_sigma=model.learn_sigma)
    num_steps, branches = diffusion.num_timesteps, model.num_branches
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, model.in_channels, model.input_size, model.input_size)
    batch = torch.randn(shape, generator=generator), torch.arange(args.batch_size) % model.num_classes
    table = fora_schedule(num_steps, branches, 2).compute

    def run() -> None:
        if mode == "sdt":
            router = Router(num_steps, branches, generator)
            optimizer = torch.optim.AdamW(router.parameters())
            ones = torch.ones(num_steps)
            for _ in train_trajectory(
                model, diffusion, router, optimizer, *batch, args.cfg_scale, 0.1, ones, 1e-7
            ):
                pass
            return
        paired = Paired.draw(model, diffusion, *batch, args.cfg_scale)
        if mode != "reference":
            weights = torch.tensor([1.0, 0.1, -0.1]).repeat(num_steps, branches, 1).requires_grad_()
            cache = GatedCache(table.float(), weights)
            paired.errors(cache, recompute=mode == "end-to-end")[0].mean().log().backward()

    before = cli.peak_memory()
    run()
    needed, began = (cli.peak_memory() - before) / 2**20, time.process_time()
    run()
    row = {"mode": mode, "seconds": round(time.process_time() - began, 2), "peak_mb": round(needed)}
    if mode.startswith("end-to-end"):
        passes = 1 if args.cfg_scale == 1 else 2
        values = int(table.sum()) * model.branch_size * args.batch_size * passes
        row["kept_mb"] = round(4 * values / 2**20)
    return row


def main(args: argparse.Namespace) -> None:
    # glibc would keep and split what large tensors leave, and the peak would say little.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    context = multiprocessing.get_context("spawn")
    rows = []
    for mode in MODES:
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (args, mode)))
        found = rows[-1]
        print(f"{mode:30} {found['seconds']:7.2f} s  {found['peak_mb']:6} MB on top of the model", flush=True)
    setting = vars(args) | {"dtype": "float32", "hardware": cli.hardware(torch.device("cpu"))}
    print(json.dumps(setting | {"rows": rows}))


if __name__ == "__main__":
    cli.run(main, parse_args())
