"""Train a caching router for a frozen DiT with HarmoniCa (step-wise denoising, image error proxy).

The published run (no images are needed):

    torchrun --nnodes=1 --nproc_per_node=4 --master_port 12345 train_router.py --results-dir results \\
        --model DiT-XL/2 --image-size 256 --num-classes 1000 --epochs 2000 --global-batch-size 64 \\
        --global-seed 42 --vae ema --num-works 8 --log-every 100 --ckpt-every 1000 --wandb \\
        --num-sampling-steps 10 --l1 7e-8 --lr 0.01 --max-steps 20000 --cfg-scale 1.5 --ste-threshold 0.1 \\
        --lambda-c 500

Plain `python train_router.py ...` is the same on one process. Everything lands in RESULTS_DIR/NNN-MODEL-...:
checkpoints (each a router that sample.py reads), log.txt, metrics.jsonl, schedule.png. To go on after an
interruption, run the same command with `--resume auto`: the logits come out the same, bit for bit.
"""

import argparse
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cli
import distributed
from diffusion import GaussianDiffusion, create_diffusion
from distributed import Processes
from files import replacing
from logs import RunLog
from models import DiT
from objectives import PROXY_DEFINITIONS, TrainStep, image_error_proxy, train_trajectory
from pictures import schedule_heat_map
from router import Router
from sampling import (
    TRAINING_STREAM,
    draw_labels,
    draw_noise,
    find_checkpoint,
    load_model,
    pixels_of,
    sample_generator,
    weights_fingerprint,
)
from training import Training, find_resumable, new_run_folder, read_checkpoint

# The arguments that decide the numbers: a resumed run must have the same.
SETTINGS = (
    "model", "image_size", "num_classes", "num_sampling_steps", "cfg_scale",
    "ste_threshold", "l1", "lambda_c", "proxy", "lr", "global_batch_size", "global_seed", "precision",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a caching router for a frozen DiT (HarmoniCa).")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="DiT-XL/2", help="DiT-XL/2 and its family, or DiT-digits/2")
    model.add_argument("--ckpt", help="checkpoint file or diffusers folder (default: the official one)")
    model.add_argument("--random-weights", action="store_true", help="no checkpoint: for dry runs")
    model.add_argument("--image-size", type=cli.positive_int, help="pixels (default 256)")
    model.add_argument("--num-classes", type=cli.positive_int, help="default 1000")
    model.add_argument("--vae", help="has no effect: training needs no images")
    model.add_argument(
        "--num-works", "--num-workers", type=int, help="has no effect: training needs no images"
    )
    method = parser.add_argument_group("method (defaults: the published ones for T = 10)")
    method.add_argument("--num-sampling-steps", default="10", help="T, or a respacing such as ddim50")
    method.add_argument("--cfg-scale", type=float, default=1.5, help="guidance, 1 = off")
    method.add_argument(
        "--ste-threshold", type=cli.threshold, default=0.1, help="compute where score > threshold"
    )
    method.add_argument(
        "--l1", type=float, default=7e-8, help="regularization weight beta of the scores' sum"
    )
    method.add_argument(
        "--lambda-c", type=cli.positive_int, default=500, help="train steps between proxy refreshes"
    )
    method.add_argument("--proxy", choices=PROXY_DEFINITIONS, default="released", help="definition of lambda")
    training = parser.add_argument_group("training")
    training.add_argument("--lr", type=float, default=0.01)
    training.add_argument("--epochs", type=cli.positive_int, default=2000, help="trajectories")
    training.add_argument(
        "--max-steps", type=cli.positive_int, default=20000, help="train steps; ends the run"
    )
    training.add_argument(
        "--global-batch-size", type=cli.positive_int, default=64, help="samples of all processes"
    )
    training.add_argument("--global-seed", type=cli.non_negative_int, default=42)
    output = parser.add_argument_group("output")
    output.add_argument("--results-dir", type=Path, default=Path("results"))
    output.add_argument("--log-every", type=cli.positive_int, default=100)
    output.add_argument("--ckpt-every", type=cli.positive_int, default=1000)
    output.add_argument(
        "--resume", metavar="PATH|auto", help="a run's folder or checkpoint; auto: the newest like this"
    )
    output.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    cli.add_device_arguments(parser)
    return parser.parse_args()


LOSSES = ("loss", "data_loss", "score_sum")


class Window:
    """Losses since the last line of the log; kept on the device until somebody asks."""

    def __init__(self):
        self._pending: list[tuple[int, TrainStep]] = []
        self._values: list[list[float]] = []

    def add(self, train_steps: int, update: TrainStep) -> None:
        self._pending.append((train_steps, update))

    def settle(self) -> None:
        """Average what is pending over ranks and bring it to the host, in one exchange.

        Raises ValueError where a loss is NaN or infinite, naming the step.
        """
        if not self._pending:
            return
        rows = [torch.stack([u.loss, u.data_loss, u.score_sum]) for _, u in self._pending]
        values = distributed.mean(torch.stack(rows)).tolist()
        for (train_steps, update), (loss, *_) in zip(self._pending, values, strict=True):
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} at train step {train_steps} (denoising step {update.step}); the "
                    "last checkpoint is intact; check the model's weights, lower --lr or use --precision fp32"
                )
        self._pending.clear()
        self._values += values

    def summary(self) -> dict[str, float]:
        """Means since the last summary; empty where nothing was trained since."""
        self.settle()
        values, self._values = self._values, []
        means = [sum(column) / len(values) for column in zip(*values, strict=True)]
        return dict(zip(LOSSES, means, strict=False))


class Run:
    """One training: the loop over trajectories, and what it leaves behind every so many train steps."""

    def __init__(
        self,
        args: argparse.Namespace,
        processes: Processes,
        model: DiT,
        diffusion: GaussianDiffusion,
        settings: dict,
    ):
        self.args, self.processes, self.settings = args, processes, settings
        self.model, self.diffusion = model, diffusion
        generator = torch.Generator().manual_seed(args.global_seed)
        router = Router(diffusion.num_timesteps, model.num_branches, generator)
        self.training = Training(router, args.lr, processes.device)
        self.total = min(args.epochs * diffusion.num_timesteps, args.max_steps)
        self.window = Window()
        self.folder: Path | None = None  # rank 0's alone

    def open(self) -> None:
        """Find or make the run's folder (rank 0 decides for all) and restore the state to go on from."""
        args, path, checkpoint = self.args, None, None
        if self.processes.is_main:
            if args.resume:
                path = find_resumable(args.results_dir, args.resume, self.settings)
            if path is not None:
                checkpoint, self.folder = read_checkpoint(path, self.settings), path.parent.parent
            else:
                name = f"{args.model.replace('/', '-')}-T{self.diffusion.num_timesteps}"
                self.folder = new_run_folder(args.results_dir, f"{name}-seed{args.global_seed}")
        checkpoint = distributed.from_main(checkpoint)
        if checkpoint is not None:
            self.training.load_state(checkpoint)
        self.log = RunLog(self.folder, self.settings if args.wandb else None)
        if args.random_weights:
            self.log.info("RANDOM WEIGHTS: no checkpoint is loaded; the router means nothing")
        self.log.info(f"resuming from {path}" if path else f"writing to {self.folder}")
        self.log.forget_after(self.training.train_steps)
        self.started, self.start_step = time.monotonic(), self.training.train_steps

    def draw(self) -> tuple[Tensor, Tensor]:
        """This rank's share of the trajectory's noise (n, C, H, W) and labels (n,)."""
        local = self.args.global_batch_size // self.processes.world_size
        indices = range(self.processes.rank * local, (self.processes.rank + 1) * local)
        seed, trajectory = self.args.global_seed, self.training.trajectory
        generators = [sample_generator(seed, TRAINING_STREAM, trajectory, index) for index in indices]
        noise, labels = draw_noise(self.model, generators), draw_labels(self.model, generators)
        return noise.to(self.processes.device), labels.to(self.processes.device)

    def refresh_due(self) -> bool:
        """Whether a multiple of --lambda-c train steps was passed since the last trajectory began."""
        now, before = self.training.train_steps, self.training.train_steps - self.diffusion.num_timesteps
        return now // self.args.lambda_c > before // self.args.lambda_c

    def train(self) -> None:
        training, args = self.training, self.args
        hidden = None if self.processes.is_main else True  # None: shown on a terminal
        with tqdm(total=self.total, initial=training.train_steps, unit="step", disable=hidden) as bar:
            while training.train_steps < self.total:
                training.mark_boundary()
                noise, labels = self.draw()
                if self.refresh_due():
                    weights = image_error_proxy(
                        self.model, self.diffusion, training.router, noise, labels,
                        args.cfg_scale, args.ste_threshold, args.proxy,
                    )  # fmt: skip
                    training.proxy_weights = distributed.mean(weights)
                self.run_trajectory(noise, labels, bar)
                self.window.settle()
        if training.train_steps > self.start_step and training.train_steps % args.ckpt_every:
            self.checkpoint()
        self.log.info(
            f"finished {training.train_steps} train steps; the router is in {self.folder}/checkpoints"
        )
        self.log.close()

    def run_trajectory(self, noise: Tensor, labels: Tensor, bar: tqdm) -> None:
        """The first denoising step, which counts but trains nothing, then one update a step, to the total."""
        training, args = self.training, self.args
        updates = train_trajectory(
            self.model, self.diffusion, training.router, training.optimizer, noise, labels,
            args.cfg_scale, args.ste_threshold, training.proxy_weights, args.l1,
        )  # fmt: skip
        self.step_done(bar)
        for update in updates if training.train_steps < self.total else ():
            self.window.add(training.train_steps + 1, update)
            self.step_done(bar)
            if training.train_steps == self.total:
                return

    def step_done(self, bar: tqdm) -> None:
        self.training.train_steps += 1
        bar.update()
        if self.training.train_steps % self.args.log_every == 0:
            self.log_line()
        if self.training.train_steps % self.args.ckpt_every == 0:
            self.checkpoint()

    def log_line(self) -> None:
        values, steps = self.window.summary(), self.training.train_steps
        values["cur"] = self.training.router.schedule(self.args.ste_threshold).cur
        values["steps_per_second"] = (steps - self.start_step) / (time.monotonic() - self.started)
        left = (self.total - steps) / values["steps_per_second"]
        losses = "".join(f"{k.replace('_', ' ')} {values[k]:.4e}  " for k in LOSSES if k in values)
        self.log.info(
            f"step {steps:7d}/{self.total}  {losses}CUR {100 * values['cur']:.2f} %  "
            f"{values['steps_per_second']:.2f} steps/s  {left / 60:.1f} min left"
        )
        self.log.metrics(steps, values | {"proxy_weights": self.training.proxy_weights.tolist()})

    def checkpoint(self) -> None:
        """Rank 0 writes the router with its training state, and the schedule as a picture."""
        self.window.settle()
        if not self.processes.is_main:
            return
        args, router = self.args, self.training.router
        schedule = router.schedule(args.ste_threshold)
        path = self.training.save(
            self.folder / "checkpoints", self.settings, method="harmonica", model=args.model,
            image_size=pixels_of(self.model), cfg_scale=args.cfg_scale, threshold=args.ste_threshold,
            cur=round(schedule.cur, 6), reg_weight=args.l1, proxy=args.proxy,
            respacing=args.num_sampling_steps,
        )  # fmt: skip
        steps = self.training.train_steps
        title = f"{args.model}, T = {router.num_steps}, train step {steps}, CUR {100 * schedule.cur:.1f} %"
        heat_map = schedule_heat_map(router.scores(), args.ste_threshold, self.model.branches, title)
        self.log.picture(steps, "schedule", heat_map)
        with replacing(path.with_suffix(".png")) as temporary:
            heat_map.save(temporary)
        self.log.info(f"saved {path}")


def main(args: argparse.Namespace) -> None:
    processes = distributed.start(args.device)
    if args.global_batch_size % processes.world_size:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} cannot be shared by {processes.world_size} ranks, "
            f"take a multiple of {processes.world_size}"
        )
    if processes.device.type == "cuda":  # or a resumed run would not repeat its bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if not args.ckpt and not args.random_weights:
        args.ckpt = find_checkpoint(args.model, args.image_size, fetch=False)
    args.precision, dtype = cli.set_precision(args.precision, processes.device)
    model = load_model(
        args.model, args.ckpt, args.image_size, args.num_classes, processes.device, dtype, args.random_weights
    )
    diffusion = create_diffusion(args.num_sampling_steps, learn_sigma=model.learn_sigma)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"image_size": pixels_of(model), "num_classes": model.num_classes}
    settings["weights"] = weights_fingerprint(model)
    run = Run(args, processes, model, diffusion, settings)
    run.open()
    if args.ckpt and args.random_weights:
        run.log.info(f"note: --ckpt {args.ckpt} has no effect with --random-weights")
    for flag, value in (("--vae", args.vae), ("--num-works", args.num_works)):
        if value is not None:
            run.log.info(f"note: {flag} {value} has no effect, training needs no images")
    run.train()
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, parse_args())
