"""One round of router training, per method: what is drawn, and the updates that follow.

| `--method` | a round | train steps |
|---|---|---|
| `harmonica` | a trajectory from fresh noise (SDT); before it, where it is due, lambda is refreshed | T |
| `l2c` | a pair of steps for each group of a batch of data | 1 |
| `end-to-end` | a step of the search, or an update of all reuse weights (`end_to_end/rounds.py`) | 1 |

A round's noise, labels and data depend on the seed, the round's number and the sample's index alone. They
depend neither on the number of processes nor on interruptions.
"""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from backbones.denoiser import halves, sampler_for
from backbones.vae import read_vae_config
from common import distributed
from common.distributed import Processes
from diffusion import GaussianDiffusion, Sampler, WithNoise
from models import DiT
from objectives import Pair, TrainStep, Variant, image_error_proxy, train_pairs, train_trajectory
from router import Router
from sampling.seeds import TRAINING_STREAM, draw_labels, draw_noise, sample_generator
from training.data import are_pictures, numbered_batches, open_data, to_model_space
from training.settings import TrainSettings
from training.state import RowTraining, Training
from training.target import EXTRA_STEPS, Target

LABEL_DROPOUT = 0.1  # Learning-to-Cache trains on null labels too, as the DiT was trained


class Rounds:
    """What all methods share: the settings, the model, and this process's samples."""

    total_steps: int  # train steps of a run
    extra_steps = EXTRA_STEPS  # share by which a run may go on to meet its target

    def __init__(
        self,
        settings: TrainSettings,
        processes: Processes,
        model: DiT,
        diffusion: GaussianDiffusion,
        target: Target | None,
    ):
        self.settings, self.processes, self.model, self.diffusion = settings, processes, model, diffusion
        self.target, self.sampler = target, sampler_for(model, settings.sampler, diffusion)

    @property
    def name(self) -> str:
        """The method's name in a router file."""
        return self.settings.method.name

    def facts(self) -> dict[str, object]:
        """What a router file says of the method beyond its settings."""
        return {}

    def new_training(self) -> Training:
        """The state that training starts from."""
        raise NotImplementedError

    def run(self, training: Training) -> Iterator[TrainStep | None]:
        """The train steps of round `training.round`; None for a step that trains nothing."""
        raise NotImplementedError

    def draw(self, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Fresh noise (n, C, H, W) and labels (n,) on the device."""
        noise, labels = draw_noise(self.model, generators), draw_labels(self.model, generators)
        return noise.to(self.processes.device), labels.to(self.processes.device)

    def with_noise(self, generators: list[torch.Generator]) -> Sampler:
        """The sampler; what it adds as noise is drawn from the samples' generators, after `draw`."""
        if not self.sampler.adds_noise:
            return self.sampler
        shape = (self.sampler.num_steps, *self.model.sample_shape)
        noise = torch.stack([torch.randn(shape, generator=one) for one in generators], dim=1)
        rows = halves(self.model, self.settings.method.cfg_scale)
        return WithNoise(self.sampler, torch.cat([noise] * rows, dim=1).to(self.processes.device))

    def generators(self, number: int) -> list[torch.Generator]:
        """One generator per sample of this process in round `number`."""
        local = self.settings.num_samples // self.processes.world_size
        indices = range(self.processes.rank * local, (self.processes.rank + 1) * local)
        seed = self.settings.global_seed
        return [sample_generator(seed, TRAINING_STREAM, number, index) for index in indices]


class RowRounds(Rounds):
    """HarmoniCa and Learning-to-Cache: each row of a router is trained by itself."""

    steps_per_round: int
    steps_per_epoch: int  # train steps that --epochs counts as one
    rows_per_step = 1.0  # rows of the router that a train step updates, on average

    def __init__(self, settings, processes, model, diffusion, target):
        super().__init__(settings, processes, model, diffusion, target)
        method = settings.method
        costs = torch.tensor(model.branch_macs, dtype=torch.float32, device=processes.device)
        self.variant = Variant(
            branch_costs=costs / costs.mean() if method.cost == "macs" else None,
            data_loss=method.data_loss,
            straight_through=method.router_train == "ste",
        )

    @property
    def total_steps(self) -> int:
        method = self.settings.method
        return min(method.epochs * self.steps_per_epoch, method.max_steps)

    def new_router(self) -> Router:
        """The router that training starts from, a function of the seed."""
        generator = torch.Generator().manual_seed(self.settings.global_seed)
        return Router(self.diffusion.num_timesteps, self.model.num_branches, generator)

    def new_training(self) -> RowTraining:
        method = self.settings.method
        return RowTraining(
            self.new_router(), method.lr, self.processes.device, self.steps_per_round, method.ste_threshold,
            method.l1, self.target, self.rows_per_step,
        )  # fmt: skip


class Trajectories(RowRounds):
    """HarmoniCa. Needs no images."""

    def __init__(self, settings, processes, model, diffusion, target):
        super().__init__(settings, processes, model, diffusion, target)
        self.variant = replace(self.variant, one_step=settings.method.rollout == "one-step")
        self.steps_per_round = self.steps_per_epoch = diffusion.num_timesteps

    def facts(self) -> dict[str, object]:
        return {"proxy": self.settings.method.proxy}

    def new_training(self) -> RowTraining:
        training = super().new_training()
        distributed.average_gradients(training.optimizer)
        return training

    def run(self, training: RowTraining) -> Iterator[TrainStep | None]:
        method = self.settings.method
        generators = self.generators(training.round)
        noise, labels = self.draw(generators)
        sampler = self.with_noise(generators)
        setting = noise, labels, method.cfg_scale, method.ste_threshold
        if method.proxy != "none" and self._refresh_due(training.train_steps):
            proxy_weights = image_error_proxy(
                self.model, sampler, training.router, *setting, method.proxy,
                self.variant.straight_through,
            )  # fmt: skip
            training.proxy_weights = distributed.mean(proxy_weights)
        updates = train_trajectory(
            self.model, sampler, training.router, training.optimizer, *setting,
            training.proxy_weights, training.reg_weight, self.variant,
        )  # fmt: skip
        yield None
        yield from updates

    def _refresh_due(self, train_steps: int) -> bool:
        """Whether a multiple of lambda_c train steps was passed since the last trajectory began."""
        interval = self.settings.method.lambda_c
        return train_steps // interval > (train_steps - self.steps_per_round) // interval


class Pairs(RowRounds):
    """Learning-to-Cache: for each group of the batch a full step on noised data, then a routed one.

    The released trainer draws a step per rank. Here a step is drawn for each of `groups`, and one process
    computes a whole group. So a group's forward passes have the same shapes, and the same bits, whatever the
    number of processes.
    """

    steps_per_round = 1

    def __init__(self, settings, processes, model, diffusion, target):
        super().__init__(settings, processes, model, diffusion, target)
        method = settings.method
        self.data = open_data(method.data, model)
        is_folder, vae = are_pictures(self.data), settings.loaded_model.vae
        if is_folder and vae == "none":
            raise ValueError(
                f"--vae none: the images of --data {method.data} need a VAE; give ema, mse or a folder"
            )
        config = read_vae_config(vae) if is_folder else None
        if config is not None:
            config.check_encoder()
        self.vae = config and config.load(processes.device, fetch=processes.world_size == 1)
        self.steps_per_epoch = max(1, len(self.data) // settings.global_batch_size)
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None  # begins with the first round
        self.steps = full_steps(diffusion.num_timesteps, method.every_row)
        missed = (1 - Fraction(1, len(self.steps))) ** method.groups  # chance that no group draws a row
        self.rows_per_step = float(len(self.steps) * (1 - missed))

    @property
    def name(self) -> str:
        return "l2c-every-row" if self.settings.method.every_row else "l2c"

    def new_router(self) -> Router:
        router = super().new_router()
        if not self.settings.method.every_row:
            logits = router.logits.detach()
            logits[1::2] = torch.inf  # odd steps compute everything, whatever the threshold
            router.set_logits(logits)
        return router

    def run(self, training: RowTraining) -> Iterator[TrainStep | None]:
        settings, number, processes = self.settings, training.round, self.processes
        seed, method, batch_size = settings.global_seed, settings.method, settings.global_batch_size
        if self._batches is None:
            self._batches = numbered_batches(
                self.data, seed, number, batch_size, processes.rank, processes.world_size, method.num_works
            )
        steps = draw_steps(seed, number, self.steps, method.groups)
        local, size = method.groups // processes.world_size, batch_size // method.groups
        own_steps, generators = steps[processes.rank * local :][:local], self.generators(number)
        parts = zip(*(part.split(size) for part in next(self._batches)), own_steps, strict=True)
        pairs = [self._pair(generators[k * size :][:size], *part) for k, part in enumerate(parts)]
        yield train_pairs(
            self.model, self.diffusion, training.router, training.optimizer, pairs, method.ste_threshold,
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
    """Learning-to-Cache: the steps that may be computed in full: odd ones, or all but the last, step 0."""
    return range(1, num_steps, 1 if every_row else 2)


ROUNDS: dict[str, type[Rounds]] = {"harmonica": Trajectories, "l2c": Pairs}
