"""Train a caching router for a frozen DiT: HarmoniCa, Learning-to-Cache, or end to end.

The published HarmoniCa run (no images are needed):

    torchrun --nnodes=1 --nproc_per_node=4 --master_port 12345 train_router.py --results-dir results \\
        --model DiT-XL/2 --image-size 256 --num-classes 1000 --epochs 2000 --global-batch-size 64 \\
        --global-seed 42 --vae ema --num-works 8 --log-every 100 --ckpt-every 1000 --wandb \\
        --num-sampling-steps 10 --l1 7e-8 --lr 0.01 --max-steps 20000 --cfg-scale 1.5 --ste-threshold 0.1 \\
        --lambda-c 500

Plain `python train_router.py ...` is the same on one process. Everything lands in RESULTS_DIR/NNN-MODEL-...:
checkpoints (each a router that sample.py reads), log.txt, metrics.jsonl, schedule.png. To go on after an
interruption, run the same command with `--resume auto`: the logits come out the same, bit for bit.
`--global-batch-size` counts rows of a forward pass: under guidance 64 are 32 trajectories.

Instead of a regularization weight one can ask for a speed: `--target-cur 0.4` or `--target-speedup 1.6`.
Learning-to-Cache needs images: `--method l2c --data FOLDER` (one folder a class, encoded by the VAE).
Training on the error of the final image, reuse included, is `--method end-to-end --target-speedup 2`.
"""

from common import lifeline  # isort: skip  # noqa: F401  # first: under torchrun this process ends with it

import argparse
import contextlib
import dataclasses
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import execution
from backbones.denoiser import check_guidance
from backbones.loading import pixels_of
from backbones.settings import ModelSettings
from common import cli, devices, distributed
from common.distributed import Processes
from common.files import remove_partials, replacing, writing
from common.identity import weights_fingerprint
from common.pictures import schedule_heat_map
from diffusion import GaussianDiffusion, create_diffusion
from end_to_end.rounds import EndToEnd
from models import DiT
from objectives import TrainStep
from training.arguments import parse_args
from training.logs import RunLog
from training.rounds import Pairs, Trajectories, vae_spec
from training.state import find_resumable, new_run_folder, resumed_state
from training.target import Target

# The arguments that decide the numbers, where the method reads them: a resumed run must have the same.
SETTINGS = (
    "method", "model", "image_size", "num_classes", "num_sampling_steps", "cfg_scale",
    "ste_threshold", "l1", "target_cur", "target_speedup", "cost", "lambda_c", "proxy", "data_loss",
    "router_train", "rollout", "data", "every_row", "groups", "lr", "global_batch_size", "trajectories",
    "global_seed", "precision", "vae",
    "terms", "init", "window", "pool", "moments_weight", "open_share",
)  # fmt: skip
METHODS = {"harmonica": Trajectories, "l2c": Pairs, "end-to-end": EndToEnd}
LOSSES = ("loss", "data_loss", "score_sum")


class Window:
    """Losses since the last line of the log; kept on the device until somebody asks."""

    def __init__(self):
        self._pending: list[tuple[int, TrainStep]] = []
        self._values: list[list[float]] = []

    def add(self, train_steps: int, update: TrainStep) -> None:
        self._pending.append((train_steps, update))

    def __len__(self) -> int:
        """Losses that are still on the device."""
        return len(self._pending)

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
                where = f"step {update.step}" if isinstance(update.step, int) else f"steps {update.step}"
                raise ValueError(
                    f"the loss is {loss} at train step {train_steps} (denoising {where}); the "
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
    """One training: the loop over rounds, and what it leaves behind every so many train steps."""

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
        target = choose_target(args, model, diffusion)
        self.rounds = METHODS[args.method](args, processes, model, diffusion, target)
        self.training = self.rounds.new_training()
        self.total = self.rounds.total_steps
        self.last = self.total + (int(self.total * self.rounds.extra_steps) if target else 0)
        self.window = Window()
        self.folder: Path | None = None  # rank 0's alone
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        """Let go of the folder: another process may write there now."""
        self._held.close()

    def open(self) -> None:
        """Find or make the run's folder (rank 0 decides for all) and restore the state to go on from."""
        checkpoint = distributed.from_main(distributed.together(self._open_folder))
        if checkpoint is not None:
            self.training.load_state(checkpoint)
        with self._saying_what_is_kept():
            distributed.together(lambda: self.log.forget_after(self.training.train_steps))
        self.started, self.start_step = time.monotonic(), self.training.train_steps

    def _open_folder(self) -> dict[str, torch.Tensor] | None:
        """On rank 0: the folder for this process alone, its log, and the state that a checkpoint holds."""
        args, path, checkpoint, notes = self.args, None, None, []
        if self.processes.is_main:
            name = f"{args.model.replace('/', '-')}-T{self.diffusion.num_timesteps}"
            name += "" if args.method == "harmonica" else f"-{self.rounds.name}"
            name += f"-seed{args.global_seed}"
            if args.resume:
                path = find_resumable(args.results_dir, args.resume, name, self.settings, notes)
            if path is None:
                self.folder = new_run_folder(args.results_dir, name)
            else:
                self.folder = path if path.is_dir() else path.parent.parent
            notes += self._held.enter_context(writing(self.folder))
            for folder in (self.folder, self.folder / "checkpoints"):
                remove_partials(folder)
            if path is not None:
                path, checkpoint = resumed_state(path, self.settings, notes)
        self.log = RunLog(self.folder, self.settings if args.wandb else None)
        self._held.callback(self.log.close)
        if args.random_weights:
            self.log.info("RANDOM WEIGHTS: no checkpoint is loaded; the router means nothing")
        else:
            self.log.info(f"weights: {self.model.source}")
        for note in notes:
            self.log.info(note)
        self.log.info(f"resuming from {path}" if path else f"writing to {self.folder}")
        return checkpoint

    @contextlib.contextmanager
    def _saying_what_is_kept(self) -> Iterator[None]:
        """A full disk, an exceeded quota: name the checkpoint from which the run goes on."""
        try:
            yield
        except OSError as error:
            if self.folder is None:
                raise
            saved = max((self.folder / "checkpoints").glob("*[0-9].safetensors"), default=None)
            kept = f"the last checkpoint, {saved}, is whole" if saved else "there is no checkpoint yet"
            raise OSError(f"{error}; {kept}; the same command with --resume auto goes on") from error

    @property
    def finished(self) -> bool:
        """At the total; with a target, from then on when it is met, at the latest after the extra steps."""
        steps = self.training.train_steps
        if self.training.target is None or not self.total <= steps < self.last:
            return steps >= self.last
        return distributed.from_main(self.training.target_met)

    def train(self) -> None:
        """Train to the end. Raises OSError where what it leaves behind cannot be written."""
        with self._saying_what_is_kept():
            self._train()

    def _train(self) -> None:
        training, args = self.training, self.args
        hidden = None if self.processes.is_main else True  # None: shown on a terminal
        with tqdm(total=self.total, initial=training.train_steps, unit="step", disable=hidden) as bar:
            while not self.finished:
                if self.rounds.steps_per_round > 1:  # else a checkpoint is between rounds and marks it itself
                    training.mark_boundary()
                self.run_round(bar)
                if len(self.window) >= self.diffusion.num_timesteps:
                    self.window.settle()
        if training.train_steps > self.start_step and training.train_steps % args.ckpt_every:
            self.checkpoint()
        if not training.target_met:
            missing = 100 * training.target.missing(training.schedule)
            self.log.info(
                f"warning: the target was not met, {missing:+.1f} points are missing; train longer "
                "(--max-steps), with a higher --lr or from another --l1"
            )
        self.log.info(
            f"finished {training.train_steps} train steps; the router is in {self.folder}/checkpoints"
        )

    def run_round(self, bar: tqdm) -> None:
        for update in self.rounds.run(self.training):
            if update is not None:
                self.window.add(self.training.train_steps + 1, update)
            self.step_done(bar)
            if self.finished:
                return

    def step_done(self, bar: tqdm) -> None:
        self.training.train_steps += 1
        if self.training.between_rounds:  # before a checkpoint, which holds the state of the next round
            self.training.round_done(self.total)
        bar.update()
        if self.training.train_steps % self.args.log_every == 0:
            self.log_line()
        if self.training.train_steps % self.args.ckpt_every == 0:
            self.checkpoint()

    def log_line(self) -> None:
        values, steps = self.window.summary(), self.training.train_steps
        values["cur"] = self.training.schedule.cur
        values["steps_per_second"] = (steps - self.start_step) / (time.monotonic() - self.started)
        left = (self.total - steps) / values["steps_per_second"]
        losses = "".join(f"{k.replace('_', ' ')} {values[k]:.4e}  " for k in LOSSES if k in values)
        self.log.info(
            f"step {steps:7d}/{self.total}  {losses}CUR {100 * values['cur']:.2f} %  "
            f"{values['steps_per_second']:.2f} steps/s  {left / 60:.1f} min left"
        )
        self.log.metrics(steps, values | self.training.figures())

    def checkpoint(self) -> None:
        """Rank 0 writes the router with its training state, and the schedule as a picture."""
        self.window.settle()
        distributed.together(self._write_checkpoint)

    def _write_checkpoint(self) -> None:
        if not self.processes.is_main:
            return
        args, router, schedule = self.args, self.training.router_to_save, self.training.schedule
        facts = {"proxy": args.proxy} if args.method == "harmonica" else {}
        path = self.training.save(
            self.folder / "checkpoints", self.settings, method=self.rounds.name, model=args.model,
            image_size=pixels_of(self.model), cfg_scale=args.cfg_scale, threshold=args.ste_threshold,
            cur=round(schedule.cur, 6), speedup_macs=round(schedule.speedup_macs(self.model), 6),
            respacing=args.num_sampling_steps, **facts,
        )  # fmt: skip
        steps = self.training.train_steps
        title = f"{args.model}, T = {router.num_steps}, train step {steps}, CUR {100 * schedule.cur:.1f} %"
        heat_map = schedule_heat_map(router.scores(), args.ste_threshold, self.model.branches, title)
        self.log.picture(steps, "schedule", heat_map)
        with replacing(path.with_suffix(".png")) as temporary:
            heat_map.save(temporary)
        self.log.info(f"saved {path}")


def choose_target(args: argparse.Namespace, model: DiT, diffusion: GaussianDiffusion) -> Target | None:
    for kind, value in (("cur", args.target_cur), ("speedup", args.target_speedup)):
        if value is not None:
            even_rows = args.method == "l2c" and not args.every_row
            return Target(kind, value, model, diffusion.num_timesteps, args.ste_threshold, even_rows)
    return None


def check_shared(args: argparse.Namespace, ranks: int) -> None:
    """Raise ValueError where the samples of a round, or its groups, cannot be shared by so many ranks."""
    count = args.trajectories or args.global_batch_size
    if count % ranks:
        flag = "trajectories" if "trajectories" in args.given else "global_batch_size"
        given = getattr(args, flag)
        said = f"--{flag.replace('_', '-')} {given} cannot be shared by {ranks} ranks"
        said += "" if given == count else f": it is {count} trajectories"
        raise ValueError(f"{said}, take a multiple of {ranks * given // count}")
    if args.groups and args.groups % ranks:
        raise ValueError(
            f"--groups {args.groups} cannot be shared by {ranks} ranks, take a multiple of {ranks}"
        )


def prepare(args: argparse.Namespace, processes: Processes) -> Run:
    """All that can be refused before the run's folder is made."""
    check_shared(args, processes.world_size)
    if processes.is_main:  # not at the first checkpoint
        cli.require("matplotlib", "the picture of a schedule")
        if args.wandb:
            cli.require("wandb", "--wandb")
    if processes.device.type == "cuda":  # or a resumed run would not repeat its bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    args.precision, dtype = devices.set_precision(args.precision, processes.device)
    settings = dataclasses.replace(ModelSettings.from_arguments(args), vae=vae_spec(args))
    model, _ = settings.load(processes.device, dtype, fetch=False)
    check_guidance(model, args.cfg_scale)
    weights = weights_fingerprint(model)
    if args.data_loss == "eps" and not model.learn_sigma and processes.is_main:
        warnings.warn("--data-loss has no effect: this model predicts eps alone", stacklevel=2)
    if args.compile:
        execution.compile_branches(model, processes.device)
    if args.recompute_branches:  # around the compiled ones
        execution.recompute_branches(model)
    diffusion = create_diffusion(args.num_sampling_steps, learn_sigma=model.learn_sigma)
    settings = {name: getattr(args, name) for name in SETTINGS if name not in args.unread}
    settings |= {"image_size": pixels_of(model), "num_classes": model.num_classes}
    settings |= {"null_label": model.has_null_label, "learn_sigma": model.learn_sigma, "weights": weights}
    if "trajectories" in settings:
        del settings["global_batch_size"]  # the same
    if args.method == "end-to-end":
        settings["max_steps"] = args.max_steps  # decides how the learning rate falls
    return Run(args, processes, model, diffusion, settings)


def main(args: argparse.Namespace) -> None:
    processes = distributed.start(args.device)
    if processes.is_main:
        cli.show_notes(args)
    with distributed.together(lambda: prepare(args, processes)) as run:
        run.open()
        run.train()
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, parse_args())
