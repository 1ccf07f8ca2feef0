"""One round of router training, per method: what is drawn, and the updates that follow.

| `--method` | a round | train steps |
|---|---|---|
| `harmonica` | a trajectory from fresh noise (SDT), lambda refreshed before it where due | T |
| `l2c` | a pair of steps for each group of a batch of data | 1 |
| `end-to-end` | a step of the search, or an update of all weights of reuse (`end_to_end.py`) | 1 |

A round's noise, labels and data depend on the seed, the round's number and the sample's index alone: not on
the number of processes, nor on interruptions.
"""

import argparse
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from backbones.loading import is_latent
from backbones.vae import read_vae_config
from common import distributed, registry
from common.distributed import Processes
from diffusion import GaussianDiffusion
from models import DiT
from objectives import Pair, TrainStep, Variant, image_error_proxy, train_pairs, train_trajectory
from router import Router
from sampling.seeds import TRAINING_STREAM, draw_labels, draw_noise, sample_generator
from training.data import are_pictures, numbered_batches, open_data, to_model_space
from training.state import RowTraining, Training
from training.target import EXTRA_STEPS, Target

LABEL_DROPOUT = 0.1  # Learning-to-Cache trains on null labels too, as the DiT was trained


def vae_spec(args: argparse.Namespace) -> str:
    """The `--vae` whose latents the model has: of the images to encode, or any that is a folder; else `none`.

    Only images are encoded; but a VAE's factor says what `--image-size` means.
    """
    has_images = args.method == "l2c" and args.data not in registry.data() and Path(args.data).is_dir()
    is_read = has_images or (args.vae is not None and Path(args.vae).is_dir())
    return args.vae if is_read and is_latent(args.model) else "none"


class Rounds:
    """What the methods share: the model, and this process's samples."""

    steps_per_round: int
    steps_per_epoch: int  # what --epochs counts
    rows_per_step = 1.0  # of the router, that a train step updates on average
    extra_steps = EXTRA_STEPS  # share by which a run may go on to meet its target

    def __init__(
        self,
        args: argparse.Namespace,
        processes: Processes,
        model: DiT,
        diffusion: GaussianDiffusion,
        target: Target | None,
    ):
        self.args, self.processes, self.model, self.diffusion = args, processes, model, diffusion
        self.target = target
        costs = torch.tensor(model.branch_macs, dtype=torch.float32, device=processes.device)
        self.variant = Variant(
            branch_costs=costs / costs.mean() if args.cost == "macs" else None,
            eps_only=args.data_loss == "eps",
            straight_through=args.router_train == "ste",
            one_step=args.rollout == "one-step",
        )

    @property
    def total_steps(self) -> int:
        """Train steps of a run."""
        return min(self.args.epochs * self.steps_per_epoch, self.args.max_steps)

    @property
    def name(self) -> str:
        """What a router file calls the method."""
        return self.args.method

    def new_router(self) -> Router:
        """The router that training starts from, a function of the seed."""
        generator = torch.Generator().manual_seed(self.args.global_seed)
        return Router(self.diffusion.num_timesteps, self.model.num_branches, generator)

    def new_training(self) -> Training:
        """The state that training starts from."""
        args = self.args
        return RowTraining(
            self.new_router(), args.lr, self.processes.device, self.steps_per_round, args.ste_threshold,
            args.l1, self.target, self.rows_per_step,
        )  # fmt: skip

    def run(self, training: Training) -> Iterator[TrainStep | None]:
        """The train steps of round `training.round`; None for one that trains nothing."""
        raise NotImplementedError

    def draw(self, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Fresh noise (n, C, H, W) and labels (n,) on the device."""
        noise, labels = draw_noise(self.model, generators), draw_labels(self.model, generators)
        return noise.to(self.processes.device), labels.to(self.processes.device)

    @property
    def num_samples(self) -> int:
        """Of all processes in a round: trajectories, for Learning-to-Cache images."""
        return self.args.trajectories or self.args.global_batch_size

    def generators(self, number: int) -> list[torch.Generator]:
        """One per sample of this process in round `number`."""
        local = self.num_samples // self.processes.world_size
        indices = range(self.processes.rank * local, (self.processes.rank + 1) * local)
        return [sample_generator(self.args.global_seed, TRAINING_STREAM, number, index) for index in indices]


class Trajectories(Rounds):
    """HarmoniCa. Needs no images."""

    def __init__(self, args, processes, model, diffusion, target):
        super().__init__(args, processes, model, diffusion, target)
        self.steps_per_round = self.steps_per_epoch = diffusion.num_timesteps

    def new_training(self) -> Training:
        training = super().new_training()
        distributed.average_gradients(training.optimizer)
        return training

    def run(self, training: RowTraining) -> Iterator[TrainStep | None]:
        args = self.args
        noise, labels = self.draw(self.generators(training.round))
        setting = noise, labels, args.cfg_scale, args.ste_threshold
        if args.proxy != "none" and self._refresh_due(training.train_steps):
            weights = image_error_proxy(
                self.model,
                self.diffusion,
                training.router,
                *setting,
                args.proxy,
                self.variant.straight_through,
            )
            training.proxy_weights = distributed.mean(weights)
        updates = train_trajectory(
            self.model, self.diffusion, training.router, training.optimizer, *setting,
            training.proxy_weights, training.reg_weight, self.variant,
        )  # fmt: skip
        yield None
        yield from updates

    def _refresh_due(self, train_steps: int) -> bool:
        """Whether a multiple of --lambda-c train steps was passed since the last trajectory began."""
        return train_steps // self.args.lambda_c > (train_steps - self.steps_per_round) // self.args.lambda_c


class Pairs(Rounds):
    """Learning-to-Cache: a full step on noised data, then a routed one, for each group of the batch.

    The released trainer draws a step per rank. Here `--groups` are drawn for, each of one process, whatever
    the number of processes: a group's forward passes have the same shapes and so the same bits.
    """

    steps_per_round = 1

    def __init__(self, args, processes, model, diffusion, target):
        super().__init__(args, processes, model, diffusion, target)
        self.data = open_data(args.data, model)
        is_folder = are_pictures(self.data)
        if is_folder and args.vae == "none":
            raise ValueError(
                f"--vae none: the images of --data {args.data} need a VAE; give ema, mse or a folder"
            )
        config = read_vae_config(vae_spec(args)) if is_folder else None
        if config is not None:
            config.check_encoder()
        self.vae = config and config.load(processes.device, fetch=processes.world_size == 1)
        self.steps_per_epoch = max(1, len(self.data) // args.global_batch_size)
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None  # begins with the first round
        self.steps = full_steps(diffusion.num_timesteps, args.every_row)
        missed = (1 - Fraction(1, len(self.steps))) ** args.groups  # a row, by all groups
        self.rows_per_step = float(len(self.steps) * (1 - missed))

    @property
    def name(self) -> str:
        return "l2c-every-row" if self.args.every_row else "l2c"

    def new_router(self) -> Router:
        router = super().new_router()
        if not self.args.every_row:
            logits = router.logits.detach()
            logits[1::2] = torch.inf  # odd steps compute everything, whatever the threshold
            router.set_logits(logits)
        return router

    def run(self, training: RowTraining) -> Iterator[TrainStep | None]:
        args, number, processes = self.args, training.round, self.processes
        if self._batches is None:
            self._batches = numbered_batches(
                self.data, args.global_seed, number, args.global_batch_size,
                processes.rank, processes.world_size, args.num_works,
            )  # fmt: skip
        steps = draw_steps(args.global_seed, number, self.steps, args.groups)
        local, size = args.groups // processes.world_size, args.global_batch_size // args.groups
        own_steps, generators = steps[processes.rank * local :][:local], self.generators(number)
        parts = zip(*(part.split(size) for part in next(self._batches)), own_steps, strict=True)
        pairs = [self._pair(generators[k * size :][:size], *part) for k, part in enumerate(parts)]
        yield train_pairs(
            self.model, self.diffusion, training.router, training.optimizer, pairs, args.ste_threshold,
            training.reg_weight, self.variant, steps, distributed.gathered,
        )  # fmt: skip

    def _pair(self, generators: list[torch.Generator], x: Tensor, labels: Tensor, step: int) -> Pair:
        """A group's samples, ready for the model."""
        device = self.processes.device
        x_0 = to_model_space(x.to(device), self.vae, generators)
        noise = draw_noise(self.model, generators).to(device)
        if self.model.has_null_label:
            dropped = [bool(torch.rand((), generator=one) < LABEL_DROPOUT) for one in generators]
            labels = torch.where(torch.tensor(dropped), self.model.num_classes, labels)
        return Pair(x_0, noise, labels.to(device), step)


def draw_steps(seed: int, number: int, steps: range, groups: int) -> list[int]:
    """Learning-to-Cache: the step that each group computes in full in round `number`."""
    generator = sample_generator(seed, TRAINING_STREAM, number)
    return [steps[one] for one in torch.randint(len(steps), (groups,), generator=generator).tolist()]


def full_steps(num_steps: int, every_row: bool = False) -> range:
    """Learning-to-Cache: the steps that may be computed in full: odd, or all that have one after them."""
    return range(1, num_steps, 1 if every_row else 2)
