"""A training from its settings to its last checkpoint: the loop over rounds, and what it leaves behind.

`train` is the whole of it. Which methods there are is the caller's to say: `rounds` maps their names to
subclasses of `training.rounds.Rounds`.
"""

import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import execution
from backbones.contract import Backbone
from backbones.denoiser import check_guidance
from backbones.loading import pixels_of
from common import cli, devices, distributed
from common.distributed import Processes
from common.files import remove_partials, replacing, writing
from common.identity import weights_fingerprint
from common.pictures import schedule_heat_map
from diffusion import GaussianDiffusion, create_diffusion
from objectives import TrainStep
from training.checkpoints import find_resumable, new_run_folder, resumed_state, write_checkpoint
from training.logs import LOSSES, LossLog, RunLog, to_logger
from training.rounds import Rounds
from training.settings import L2CSettings, RowSettings, TrainSettings
from training.target import Target

Show = Callable[[str], None]


def train(
    settings: TrainSettings,
    rounds: Mapping[str, type[Rounds]],
    processes: Processes,
    show: Show = to_logger,
) -> Path | None:
    """Train a router, from the start or from where a run stopped. Returns the run's folder, on rank 0 alone.

    rounds: by the name of the method. show: gets each line of the log. Raises ValueError or OSError, in one
    line, for settings that do not fit together and for files that cannot be read or written.
    """
    with distributed.together(lambda: prepare(settings, rounds, processes, show)) as run:
        run.open()
        run.train()
    return run.folder


def prepare(
    settings: TrainSettings, rounds: Mapping[str, type[Rounds]], processes: Processes, show: Show = to_logger
) -> "Run":
    """Load the model and check all that can be refused before the run's folder is made."""
    check_shared(settings, processes.world_size)
    if processes.is_main:  # not at the first checkpoint
        cli.require("matplotlib", "the picture of a schedule")
        if settings.output.wandb:
            cli.require("wandb", "--wandb")
    if processes.device.type == "cuda":  # or a resumed run would not repeat its bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    precision, dtype = devices.set_precision(settings.precision, processes.device)
    settings, method = dataclasses.replace(settings, precision=precision), settings.method
    model, _ = settings.loaded_model.load(processes.device, dtype, fetch=False)
    check_guidance(model, method.cfg_scale)
    record = settings.record() | {"image_size": pixels_of(model), "num_classes": model.num_classes}
    record |= {"null_label": model.has_null_label, "learn_sigma": model.learn_sigma}
    record |= {"weights": weights_fingerprint(model)}
    on_eps = isinstance(method, RowSettings) and method.data_loss == "eps"
    if on_eps and not model.learn_sigma and processes.is_main:
        warnings.warn("--data-loss has no effect: this model predicts eps alone", stacklevel=2)
    if settings.compile:
        execution.compile_branches(model, processes.device)
    if settings.recompute_branches:  # around the compiled ones
        execution.recompute_branches(model)
    diffusion = create_diffusion(settings.num_sampling_steps, learn_sigma=model.learn_sigma)
    target = choose_target(settings, model, diffusion)
    method_rounds = rounds[method.name](settings, processes, model, diffusion, target)
    return Run(settings, record, processes, method_rounds, show)


def check_shared(settings: TrainSettings, ranks: int) -> None:
    """Raise ValueError where the samples of a round, or its groups, cannot be shared by so many ranks."""
    count, method = settings.num_samples, settings.method
    if count % ranks:
        given = method.trajectories or settings.global_batch_size
        said = "--trajectories" if method.trajectories else "--global-batch-size"
        said += f" {given} cannot be shared by {ranks} ranks"
        said += "" if given == count else f": it is {count} trajectories"
        raise ValueError(f"{said}, take a multiple of {ranks * given // count}")
    if isinstance(method, L2CSettings) and method.groups % ranks:
        raise ValueError(
            f"--groups {method.groups} cannot be shared by {ranks} ranks, take a multiple of {ranks}"
        )


def choose_target(settings: TrainSettings, model: Backbone, diffusion: GaussianDiffusion) -> Target | None:
    """The CUR or the speed-up that the training is to meet; None where beta is given instead."""
    for kind, value in (("cur", settings.target_cur), ("speedup", settings.target_speedup)):
        if value is not None:
            method = settings.method
            even_rows = isinstance(method, L2CSettings) and not method.every_row
            return Target(kind, value, model, diffusion.num_timesteps, method.ste_threshold, even_rows)
    return None


class Run:
    """One training: the loop over rounds and train steps, its folder, log and checkpoints.

    record: the settings that decide the numbers; a run goes on only from a checkpoint with the same ones.
    """

    def __init__(
        self,
        settings: TrainSettings,
        record: dict[str, object],
        processes: Processes,
        rounds: Rounds,
        show: Show = to_logger,
    ):
        self.settings, self.record, self.processes, self.rounds = settings, record, processes, rounds
        self.training, self._show = rounds.new_training(), show
        self.total = rounds.total_steps
        self.last = self.total + (int(self.total * rounds.extra_steps) if rounds.target else 0)
        self.losses = LossLog()
        self.folder: Path | None = None  # on rank 0 alone
        self._round_start: dict[str, Tensor] = {}  # the state that checkpoints within a round hold
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        """Release the folder: another process may write there now."""
        self._held.close()

    # ---- where it writes -------------------------------------------------------------------------------

    def open(self) -> None:
        """Find or make the run's folder (rank 0 decides for all) and load the state to go on from."""
        state = distributed.from_main(distributed.together(self._open_folder))
        if state is not None:
            self.training.state.load(state)
        with self._saying_what_is_kept():
            distributed.together(lambda: self.log.forget_after(self.training.train_steps))
        self.started, self.start_step = time.monotonic(), self.training.train_steps

    def _open_folder(self) -> dict[str, Tensor] | None:
        """On rank 0: the folder for this process alone, its log, and the state that a checkpoint holds."""
        output, path, state, notes = self.settings.output, None, None, []
        if self.processes.is_main:
            name = self._name()
            if output.resume:
                path = find_resumable(output.results_dir, output.resume, name, self.record, notes)
            if path is None:
                self.folder = new_run_folder(output.results_dir, name)
            else:
                self.folder = path if path.is_dir() else path.parent.parent
            notes += self._held.enter_context(writing(self.folder))
            for folder in (self.folder, self.folder / "checkpoints"):
                remove_partials(folder)
            if path is not None:
                path, state = resumed_state(path, self.record, notes)
        self.log = RunLog(self.folder, self.record if output.wandb else None, self._show)
        self._held.callback(self.log.close)
        if self.settings.model.random_weights:
            self.log.info("RANDOM WEIGHTS: no checkpoint is loaded; the router means nothing")
        else:
            self.log.info(f"weights: {self.rounds.model.source}")
        for note in notes:
            self.log.info(note)
        self.log.info(f"resuming from {path}" if path else f"writing to {self.folder}")
        return state

    def _name(self) -> str:
        """The folder's name after its number."""
        settings = self.settings
        method = "" if settings.method.name == "harmonica" else f"-{self.rounds.name}"
        num_steps = self.rounds.diffusion.num_timesteps
        return f"{settings.model.model.replace('/', '-')}-T{num_steps}{method}-seed{settings.global_seed}"

    @contextlib.contextmanager
    def _saying_what_is_kept(self) -> Iterator[None]:
        """Where the disk is full or a quota exceeded, name the checkpoint from which the run goes on."""
        try:
            yield
        except OSError as error:
            if self.folder is None:
                raise
            saved = max((self.folder / "checkpoints").glob("*[0-9].safetensors"), default=None)
            kept = f"the last checkpoint, {saved}, is whole" if saved else "there is no checkpoint yet"
            raise OSError(f"{error}; {kept}; the same command with --resume auto goes on") from error

    # ---- the loop --------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the end. Raises OSError where log or checkpoints cannot be written."""
        with self._saying_what_is_kept():
            self._train_rounds()
            self._conclude()

    def _train_rounds(self) -> None:
        """The loop over rounds and their train steps, the only one."""
        training = self.training
        hidden = None if self.processes.is_main else True  # None: shown on a terminal
        with tqdm(total=self.total, initial=training.train_steps, unit="step", disable=hidden) as bar:
            while not self.finished:
                if training.steps_per_round > 1:  # else every checkpoint is between two rounds
                    self._round_start = training.state.tensors()
                for update in self.rounds.run(training):
                    self.step_done(update)
                    bar.update()
                    if self.finished:
                        break
                if len(self.losses) >= self.rounds.diffusion.num_timesteps:
                    self.losses.settle()

    @property
    def finished(self) -> bool:
        """At `total` train steps; with a target, as soon after them as it is met, at the latest at `last`."""
        steps = self.training.train_steps
        if self.training.target is None or not self.total <= steps < self.last:
            return steps >= self.last
        return distributed.from_main(self.training.target_met)

    def step_done(self, update: TrainStep | None) -> None:
        """Count a train step, and write the line of the log and the checkpoint that are due after it."""
        training, output = self.training, self.settings.output
        training.train_steps += 1
        if update is not None:
            self.losses.add(training.train_steps, update)
        if training.between_rounds:  # before a checkpoint, which holds the state of the next round
            training.round_done(self.total)
        if training.train_steps % output.log_every == 0:
            self._log_line()
        if training.train_steps % output.ckpt_every == 0:
            self._checkpoint()

    def _conclude(self) -> None:
        training = self.training
        if training.train_steps > self.start_step and training.train_steps % self.settings.output.ckpt_every:
            self._checkpoint()
        if not training.target_met:
            missing = 100 * training.target.missing(training.schedule)
            self.log.info(
                f"warning: the target was not met, {missing:+.1f} points are missing; train longer "
                "(--max-steps), with a higher --lr or from another --l1"
            )
        self.log.info(
            f"finished {training.train_steps} train steps; the router is in {self.folder}/checkpoints"
        )

    # ---- what it leaves --------------------------------------------------------------------------------

    def _log_line(self) -> None:
        values, steps = self.losses.summary(), self.training.train_steps
        values["cur"] = self.training.schedule.cur
        values["steps_per_second"] = (steps - self.start_step) / (time.monotonic() - self.started)
        left = (self.total - steps) / values["steps_per_second"]
        losses = "".join(f"{k.replace('_', ' ')} {values[k]:.4e}  " for k in LOSSES if k in values)
        self.log.info(
            f"step {steps:7d}/{self.total}  {losses}CUR {100 * values['cur']:.2f} %  "
            f"{values['steps_per_second']:.2f} steps/s  {left / 60:.1f} min left"
        )
        self.log.metrics(steps, values | self.training.figures())

    def _checkpoint(self) -> None:
        """Rank 0 writes the router with its training state, and the schedule as a picture."""
        self.losses.settle()
        distributed.together(self._write_checkpoint)

    def _write_checkpoint(self) -> None:
        if not self.processes.is_main:
            return
        training, model, name = self.training, self.rounds.model, self.settings.model.model
        router, schedule, method = training.router_to_save, training.schedule, self.settings.method
        state = training.state.tensors() if training.between_rounds else self._round_start
        path = write_checkpoint(
            self.folder / "checkpoints", training.train_steps, router, state, settings=self.record,
            method=self.rounds.name, model=name, image_size=pixels_of(model),
            cfg_scale=method.cfg_scale, threshold=method.ste_threshold,
            cur=round(schedule.cur, 6), speedup_macs=round(schedule.speedup_macs(model), 6),
            respacing=self.settings.num_sampling_steps, **self.rounds.facts(), **training.facts(),
        )  # fmt: skip
        title = f"{name}, T = {router.num_steps}, train step {training.train_steps}"
        title += f", CUR {100 * schedule.cur:.1f} %"
        heat_map = schedule_heat_map(router.scores(), method.ste_threshold, model.branches, title)
        self.log.picture(training.train_steps, "schedule", heat_map)
        with replacing(path.with_suffix(".png")) as temporary:
            heat_map.save(temporary)
        self.log.info(f"saved {path}")
