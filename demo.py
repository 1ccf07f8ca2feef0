"""Train a router for the digits DiT, sample with and without it, show cost and savings; then draw emoji.

    make demo            # or, with the requirements installed: python demo.py

It leaves in results/demo: comparison.png (uncached above cached), schedule.png (the learned schedule),
demo.json (the table), emoji.png (prompts drawn by the emoji's text-to-image model, uncached above cached) and
the folder of the training. A training that is there already is not repeated, and one that was interrupted
goes on.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from backbones.loading import load_model
from backbones.settings import ModelSettings
from common import cli, devices, lifeline, registry
from common.columns import aligned
from common.files import replacing, write_json
from common.pictures import comparison, schedule_heat_map
from common.timing import alternating
from diffusion import create_diffusion
from examples import emoji
from examples.digits import MODEL
from examples.digits.classifier import Judge
from models import DiT
from router import Router, Schedule, load_router
from sampling.decoding import decode
from sampling.loop import Trajectory, generate_seeded
from sampling.settings import SamplingSettings
from schedules.baselines import full_schedule
from schedules.methods import load_method
from schedules.methods import uncached as uncached_method
from schedules.settings import MethodSettings
from study.measure import fidelity
from training.checkpoints import runs

NUM_STEPS, THRESHOLD = 10, 0.1
CFG_SCALE = 1.0  # without guidance the uncached model is closest to the data
BATCH_SIZE, REPEATS = 64, 5  # for the latency
SEED = 1234  # for the samples; the training has its own
TRAINING = {
    "--model": MODEL, "--num-sampling-steps": NUM_STEPS, "--cfg-scale": CFG_SCALE,
    "--ste-threshold": THRESHOLD, "--l1": 2e-7, "--lambda-c": 100, "--lr": 0.1, "--global-batch-size": 32,
    "--log-every": 50, "--ckpt-every": 200, "--resume": "auto",
}  # fmt: skip
EMOJI_ROUTER = "emoji-T20-2x"
EMOJI = SamplingSettings("20", sampler="dpm-solver++", cfg_scale=4.5, seed=1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="HarmoniCa on handwritten digits, from training to pictures."
    )
    parser.add_argument(
        "--results-dir", type=Path, default=Path("results/demo"), help="default: results/demo"
    )
    parser.add_argument(
        "--train-steps", type=cli.positive_int, default=600, help="train steps of the router; default: 600"
    )
    parser.add_argument(
        "--samples",
        type=cli.positive_int,
        default=2000,
        help="samples for each row of the table; default: 2000",
    )
    parser.add_argument(
        "--processes", type=cli.positive_int, default=2, help="processes that train; default: 2"
    )
    return parser.parse_args()


def train(args: argparse.Namespace) -> Router:
    """Run the training command on `args.processes` processes and return the router that it leaves."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", f"--nproc_per_node={args.processes}"]
    command += ["train_router.py", "--results-dir", str(args.results_dir.resolve()), "--device", "cpu"]
    command += [str(part) for item in TRAINING.items() for part in item]
    command += ["--max-steps", str(args.train_steps)]
    print("$", " ".join(command), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.processes))}
    command = lifeline.bound(command)
    status = subprocess.run(command, cwd=Path(__file__).parent, env=environment, check=False).returncode
    if status:
        raise ValueError(f"the training above ended with exit status {status}")
    logs = [run / "log.txt" for run in runs(args.results_dir)]
    newest = max(logs, key=lambda log: log.stat().st_mtime).parent  # this run's, also where it was finished
    return load_router(newest, MODEL, NUM_STEPS)


def measure(
    model: DiT, judge: Judge, x_0: Tensor, labels: Tensor, uncached: Tensor, method: str, schedule: Schedule
) -> dict:
    """One row of the table."""
    return {
        "method": method,
        "num_steps": schedule.num_steps,
        "cur": schedule.cur,
        "macs_per_image": schedule.macs(model),
    } | fidelity(judge, x_0, uncached, labels)


# Head of a column, and what makes its cell from a row.
COLUMNS = [
    ("method", lambda row: f"{row['method']:22}"),
    ("steps", lambda row: str(row["num_steps"])),
    ("CUR %", lambda row: f"{100 * row['cur']:.1f}"),
    ("MACs/image", lambda row: f"{row['macs_per_image'] / 1e6:.0f} M"),
    ("ms/batch", lambda row: f"{row['latency_ms']:.1f}"),
    ("digits-FID", lambda row: f"{row['digits_fid']:.3f}"),
    ("FD uncached", lambda row: f"{row['fd_uncached']:.3f}"),
    ("accuracy %", lambda row: f"{100 * row['accuracy']:.2f}"),
    ("MSE", lambda row: f"{row['mse']:.2e}"),
]


def announcement(args: argparse.Namespace) -> str:
    """What is going to happen, and how long it takes."""
    return (
        f"This trains a caching router for a small diffusion model ({args.train_steps} train steps), then "
        f"draws {args.samples:,} digits with and without it and compares them, and emoji last: a few minutes "
        f"on two CPU cores. Nothing is downloaded. It writes to {args.results_dir}."
    )


def main(args: argparse.Namespace) -> None:
    print(announcement(args), flush=True)
    router = train(args)
    model, judge = load_model(MODEL), Judge()
    schedule = router.schedule(THRESHOLD)
    affordable = math.ceil(NUM_STEPS / schedule.speedup_macs(model))  # steps for as many MACs, or a few more
    fewer_steps = min(affordable, NUM_STEPS - 1)
    methods = {
        "uncached": full_schedule(NUM_STEPS, model.num_branches),
        "harmonica": schedule,
        "uncached, fewer steps": full_schedule(fewer_steps, model.num_branches),
    }
    labels, samples, draws = torch.arange(args.samples) % model.num_classes, {}, {}
    for method, chosen in methods.items():
        print(f"sampling {args.samples} digits: {method}", flush=True)
        trajectory = Trajectory(model, create_diffusion(str(chosen.num_steps)), CFG_SCALE, chosen)
        draws[method] = partial(generate_seeded, trajectory, seed=SEED)
        samples[method] = draws[method](labels, batch_size=250, progress=True)
    batches = [partial(draw, labels[:BATCH_SIZE]) for draw in draws.values()]
    seconds = dict(zip(draws, alternating(batches, REPEATS, torch.device("cpu"), warm_up=0), strict=True))

    rows = []
    for method, x_0 in samples.items():
        rows.append(measure(model, judge, x_0, labels, samples["uncached"], method, methods[method]))
        rows[-1]["latency_ms"] = 1000 * statistics.median(seconds[method])
    print()
    print(aligned(rows, COLUMNS), flush=True)
    write_results(args.results_dir, rows, router, samples, model)
    draw_emoji(args.results_dir)


def draw_emoji(folder: Path) -> None:
    """FOLDER/emoji.png: prompts drawn by the emoji's model, uncached above cached, with their times."""
    preset = registry.text_models()[emoji.MODEL]
    if not preset.is_there:
        print(f"no emoji are drawn: the weights of {emoji.MODEL} are not in {preset.folder}; {preset.remedy}")
        return
    prompts = emoji.FOLDER / "prompts" / "demo.txt"
    print(f"drawing the prompts of {prompts} with and without a cache", flush=True)
    model, vae_config = ModelSettings(emoji.MODEL, prompts=prompts).load()
    vae, labels = vae_config.load(), torch.arange(model.num_classes)
    spec = EMOJI_ROUTER if EMOJI_ROUTER in registry.router_names() else "fora:2"
    cached = load_method(MethodSettings.from_spec(spec), model, EMOJI, emoji.MODEL)
    parts, seconds = [], []
    for name, method in (("uncached", uncached_method(model, EMOJI)), ("cached, same noise", cached)):
        draw = partial(generate_seeded, method.trajectory(model, EMOJI), labels, EMOJI.seed, len(labels))
        draw()  # the warm-up
        began = time.perf_counter()
        x_0 = draw()
        seconds.append(time.perf_counter() - began)
        parts.append((f"{name}, {1000 * seconds[-1]:.0f} ms for {len(labels)}", decode(x_0, vae)))
    with replacing(folder / "emoji.png") as temporary:
        comparison(parts, columns=len(labels)).save(temporary)
    faster = f"{seconds[0] / seconds[1]:.2f}x measured, {cached.speedup_macs(model, 20):.2f}x by MACs"
    print(f"emoji: {cached.schedule.source}, {faster}; look at {folder}/emoji.png")


def write_results(
    folder: Path, rows: list[dict], router: Router, samples: dict[str, Tensor], model: DiT
) -> None:
    uncached, cached = rows[0], rows[1]
    hardware = f"{devices.hardware(torch.device('cpu'))}, fp32"
    print(
        f"\nspeed-up of harmonica: {uncached['latency_ms'] / cached['latency_ms']:.2f}x measured "
        f"({hardware}, batch {BATCH_SIZE}, median of {REPEATS}), "
        f"{uncached['macs_per_image'] / cached['macs_per_image']:.2f}x by MACs"
    )
    captions = {
        "uncached": f"uncached, {uncached['latency_ms']:.0f} ms per batch of {BATCH_SIZE}",
        "harmonica": f"HarmoniCa, same noise, {cached['latency_ms']:.0f} ms, CUR {100 * cached['cur']:.0f} %",
    }
    parts = [(caption, decode(samples[method][:40])) for method, caption in captions.items()]
    picture = comparison(parts, columns=10)
    title = f"{MODEL}, T = {NUM_STEPS}, CUR {100 * cached['cur']:.1f} %"
    heat_map = schedule_heat_map(router.scores(), THRESHOLD, model.branches, title)
    for name, image in (("comparison", picture), ("schedule", heat_map)):
        with replacing(folder / f"{name}.png") as temporary:
            image.save(temporary)
    facts = {"samples": len(samples["uncached"]), "seed": SEED, "cfg_scale": CFG_SCALE, "hardware": hardware}
    write_json(folder / "demo.json", facts | {"batch_size": BATCH_SIZE, "rows": rows})
    print(f"look at {folder}/comparison.png and {folder}/schedule.png")


if __name__ == "__main__":
    cli.run(main, parse_args())
