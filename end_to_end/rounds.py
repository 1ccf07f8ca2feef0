"""`--method end-to-end`: a schedule and its reuse weights, trained on the error of the final image.

A training is a plan of phases. Every train step draws a fresh batch and belongs to one phase.

| phase | train steps | what a step does |
|---|---|---|
| linearise | 1 | a few batches make tables; by these, cells are closed down to the budget (`linear.py`) |
| update | all that are left | one Adam step on all reuse weights at once, on the log of the MSE of x_0 |

`--search grow` is the older search. It takes the place of the first phase:

| phase | train steps | what a step does |
|---|---|---|
| grow, one per candidate | 4 each | a skeleton of full rows grows by cells towards the budget (`search.py`) |
| exchange | 5 | the best candidate exchanges cells, kept where the error falls |

With `--terms 0` (reuse as stored) there are no weights to train: the linear search ends the run, and the
older one exchanges in all steps that are left. With a pool and weights the older one exchanges nothing: one
step settles the best candidate. docs/method.md says why it is built so, and what did worse.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from backbones.loading import is_latent
from cache import GatedCache
from common import distributed
from end_to_end import linear, search
from end_to_end.importance import inclusion, systematic_sample
from end_to_end.trajectory import ReferenceTrajectory, toggle_effects
from objectives import TrainStep
from router import DEFAULT_THRESHOLD, Router, Schedule, load_router, weights_read
from sampling.seeds import TRAINING_STREAM, sample_generator
from schedules.any_speed import closed_cells, fit_cells, moved, moving_scale
from training.rounds import Rounds
from training.state import Training
from training.target import Target

LEAST_ERROR = 1e-12
POOL_ROUNDS = 32  # rounds that draw from one pool
GROWTHS, EXCHANGES = 4, 5  # train steps of a candidate, and of the chosen one


class EndToEndTraining(Training):
    """Candidate schedules (C, T, B), the one that is worked on, and the reuse weights of the chosen one.

    The reuse weights are `fitted + scale @ moves`. Adam sees `moves`, see `moving_scale`.
    exchange_share: the share of the budget that the next exchange may move.
    """

    def __init__(
        self,
        num_candidates: int,
        size: tuple[int, int],
        num_terms: int,
        lr: float,
        target: Target,
        device: torch.device,
    ):
        super().__init__(1, target)
        terms = max(1, num_terms)
        self.num_terms, self.device = num_terms, device
        self.candidates = torch.zeros(num_candidates, *size, dtype=torch.bool)
        self.candidates[:, -1] = True
        self.current, self.exchange_share = 0, search.FIRST_EXCHANGE
        self.fitted = torch.zeros(*size, terms, device=device)
        self.fitted[..., 0] = 1
        self.scale = torch.zeros(*size, terms, terms, device=device)
        self.moves = nn.Parameter(torch.zeros(*size, terms, device=device))
        self.optimizer = torch.optim.Adam([self.moves], lr=lr, betas=(0.9, 0.99), fused=True)
        distributed.average_gradients(self.optimizer)
        self.state.add_attribute(self, "candidates", "tables")
        self.state.add_attribute(self, "exchange_share", "part")
        for name in ("current", "fitted", "scale", "moves"):
            self.state.add_attribute(self, name)
        self.state.add_adam(self.optimizer, self.moves)

    @property
    def compute(self) -> Tensor:
        """The schedule (T, B) that is worked on."""
        return self.candidates[self.current]

    @compute.setter
    def compute(self, compute: Tensor) -> None:
        self.candidates[self.current] = compute

    def choose(self, compute: Tensor) -> None:
        """From here on this schedule alone is worked on."""
        self.current, self.candidates[0] = 0, compute

    def reuse_weights(self) -> Tensor:
        """(T, B, K), differentiable in `moves`."""
        return moved(self.fitted, self.scale, self.moves)

    def start_moving(self, fitted: search.Fit) -> None:
        """From here on the weights of reused cells move away from the fitted ones."""
        read = weights_read(self.compute, max(1, self.num_terms))
        plain = torch.zeros_like(fitted.reuse_weights)
        plain[..., 0] = 1
        reused = read.any(-1, keepdim=True)
        self.fitted = torch.where(reused, fitted.reuse_weights * read, plain).float().to(self.device)
        scale = moving_scale(fitted.gram, fitted.residual) * read[..., None]
        self.scale = scale.float().to(self.device)

    @property
    def schedule(self) -> Schedule:
        weights = self.reuse_weights().detach() if self.num_terms else None
        return Schedule(self.compute, "end-to-end", weights)

    @property
    def router_to_save(self) -> Router:
        return Router.from_schedule(self.schedule)


class Batch(NamedTuple):
    """What a train step is about: this process's samples, and a generator for each of them."""

    reference: ReferenceTrajectory
    generators: list[torch.Generator]


class Phase(NamedTuple):
    """Consecutive train steps of one kind. step: does number 0 .. num_steps - 1 of them."""

    num_steps: int
    step: Callable[[EndToEndTraining, Batch, int], TrainStep]


class EndToEnd(Rounds):
    """Training on the error of the final image. Needs no images."""

    extra_steps = 0.0  # the budget is met by construction

    def __init__(self, settings, processes, model, diffusion, target):
        super().__init__(settings, processes, model, diffusion, target)
        method, num_steps = settings.method, diffusion.num_timesteps
        self.is_linear = method.search == "linear"
        self.num_terms = method.terms
        self.total_steps = 1 if self.is_linear and not method.terms else method.max_steps
        self.budget = search.Budget.of(target, method.terms)
        self.warm_start = None
        if method.init and not self.is_linear:
            router = load_router(method.init, settings.model.model, num_branches=model.num_branches)
            source = router.schedule(router.info.get("threshold", DEFAULT_THRESHOLD))
            self.warm_start = search.interpolated(source.compute, num_steps)
        self.candidates = self.budget.candidates_for_pool(num_steps) if method.pool else search.CANDIDATES
        self.num_candidates = 1 if method.init or self.is_linear else len(self.candidates)
        self.plan = self._plan()
        self._pool: tuple[int, Tensor] | None = None  # its first round, and the samples' probabilities

    @property
    def name(self) -> str:
        return "end-to-end+forecast" if self.num_terms else "end-to-end"

    def new_training(self) -> EndToEndTraining:
        size, lr = (self.diffusion.num_timesteps, self.model.num_branches), self.settings.method.lr
        device = self.processes.device
        return EndToEndTraining(self.num_candidates, size, self.num_terms, lr, self.target, device)

    def run(self, training: EndToEndTraining) -> Iterator[TrainStep]:
        generators = self.generators(training.round)
        if self.settings.method.pool:
            reference = self._draw_from_pool(training.round)
        else:
            reference = self._reference(generators)
        phase, number = self._place(training.train_steps)
        yield phase.step(training, Batch(reference, generators), number)

    # ---- the plan --------------------------------------------------------------------------------------

    def _plan(self) -> list[Phase]:
        """The phases of a run, `max_steps` train steps together.

        Raises ValueError where the search alone takes more.
        """
        method = self.settings.method
        if self.is_linear:
            left = self.total_steps - 1
            return [Phase(1, self._linearise), Phase(left, partial(self._update, left))]
        phases = [Phase(GROWTHS, partial(self._grow, candidate)) for candidate in range(self.num_candidates)]
        if method.pool and self.num_terms:  # what an exchange gains on one batch is lost on the next
            phases.append(Phase(1, self._settle))
        else:
            phases.append(Phase(EXCHANGES, self._exchange))
        search_steps = sum(phase.num_steps for phase in phases)
        if method.max_steps < search_steps:
            raise ValueError(
                f"--max-steps {method.max_steps} ends within the search, which takes {search_steps}; "
                "give more"
            )
        left = method.max_steps - search_steps
        last = partial(self._update, left) if self.num_terms else phases.pop().step
        before = sum(phase.num_steps for phase in phases)
        return [*phases, Phase(method.max_steps - before, last)]

    def _place(self, train_steps: int) -> tuple[Phase, int]:
        """The phase of the train step that follows so many, and its number within the phase."""
        for phase in self.plan:
            if train_steps < phase.num_steps:
                return phase, train_steps
            train_steps -= phase.num_steps
        raise AssertionError("the plan has ended")

    # ---- a step of each phase --------------------------------------------------------------------------

    def _linearise(self, training: EndToEndTraining, batch: Batch, _number: int) -> TrainStep:
        """The schedule and the weights that the linearised error of x_0 asks for."""
        tables = linear.Linearised(*self._tables(training.round), self.num_terms)
        order = tables.closing_order(self.budget)
        training.choose(closed_cells(order, tables.num_steps, tables.num_branches))
        fitted, scale = fit_cells(tables.gram, training.compute, max(1, self.num_terms))
        if self.num_terms:
            moves, _ = tables.solve(training.compute)
            training.fitted = moved(fitted, scale, moves).float().to(training.device)
            training.scale = scale.float().to(training.device)
        reference = batch.reference
        cache = GatedCache(training.compute.to(reference.noise), training.reuse_weights().detach())
        return self._logged(training, training.compute, self._error(reference, cache))

    def _tables(self, number: int) -> tuple[Tensor, Tensor]:
        """Gram and projections over the samples of the search, of all ranks, see `linear.record`."""
        size, rank = self.settings.num_samples, self.processes.rank
        method, local = self.settings.method, size // self.processes.world_size
        num_batches = -(-method.search_samples // size)
        grams, projections = [], []
        for part in tqdm(range(num_batches), desc="linearise", leave=False, disable=True if rank else None):
            first = part * size + rank * local
            generators = self._sample_generators(number, range(first, first + local))
            reference = self._draw_from_pool(number, part) if method.pool else self._start(generators)
            gram, own = linear.record(reference, generators, recompute=not method.keep_activations)
            grams.append(distributed.mean(gram.to(self.processes.device)).cpu())
            projections.append(distributed.gathered(own.to(self.processes.device)).cpu())
            self._check_finite(grams[-1].sum().item() + projections[-1].sum().item(), 1)
        return torch.stack(grams).mean(0), torch.cat(projections).flatten(0, 1)

    def _grow(self, candidate: int, training: EndToEndTraining, batch: Batch, number: int) -> TrainStep:
        """One growth of a candidate: the first builds its skeleton, the last meets the budget."""
        training.current = candidate
        if number == 0:
            training.compute = self._skeleton(candidate, batch.reference)
        effects, _ = self._effects(training, batch)
        spent = self.budget.spent(training.compute)
        goal = spent + (self.budget.allowed - spent) / (GROWTHS - number)
        training.compute = search.spending(training.compute, effects, self.budget, goal)
        return self._outcome(training, self._fit(batch.reference, training.compute))

    def _exchange(self, training: EndToEndTraining, batch: Batch, number: int) -> TrainStep:
        """Keep an exchange that lowers the error on this batch; else the next one is half as large."""
        if number == 0:
            self._choose(training, batch.reference)
        effects, fitted = self._effects(training, batch)
        compute = search.exchanged(training.compute, effects, self.budget, training.exchange_share)
        changed = self._fit(batch.reference, compute)
        if changed.error < fitted.error:
            training.compute, fitted = compute, changed
        else:
            training.exchange_share /= 2
        return self._outcome(training, fitted)

    def _settle(self, training: EndToEndTraining, batch: Batch, _number: int) -> TrainStep:
        """The best candidate as it is."""
        self._choose(training, batch.reference)
        return self._outcome(training, self._fit(batch.reference, training.compute))

    def _update(self, num_updates: int, training: EndToEndTraining, batch: Batch, number: int) -> TrainStep:
        """One Adam step on all reuse weights."""
        return self._descend(
            training.optimizer, batch.reference, training.compute, training.reuse_weights(),
            number, num_updates,
        )  # fmt: skip

    def _descend(
        self,
        optimizer: torch.optim.Optimizer,
        reference: ReferenceTrajectory,
        compute: Tensor,
        reuse_weights: Tensor,
        number: int,
        num_updates: int,
    ) -> TrainStep:
        """Update number `number` of so many, of what the reuse weights (T, B, K) are made of."""
        method = self.settings.method
        (group,) = optimizer.param_groups
        group["lr"] = search.learning_rate(method.lr, number, num_updates)
        cache = GatedCache(compute.to(reference.noise), reuse_weights)
        deviations = reference.deviations(cache, not method.keep_activations, method.window)
        losses = errors = torch.stack([one.square().mean(1).mean() for one in deviations])
        if method.moments_weight:
            in_pixels, count = not is_latent(self.model), self.settings.num_samples
            moments = reference.moment_error(deviations[0], in_pixels, count, distributed.mean)
            losses = torch.cat([errors[:1] + method.moments_weight * moments, errors[1:]])
        # The loss is the logarithm of the mean over all ranks, not the mean of the ranks' logarithms.
        means = distributed.mean(torch.stack([losses.detach(), errors.detach()]))  # (2, windows)
        means = means.clamp(min=LEAST_ERROR)  # a window whose steps are all computed has no error
        optimizer.zero_grad()
        (losses / means[0]).mean().backward()
        optimizer.step()
        return TrainStep(0, means[0].log().mean(), means[1, 0], compute.sum().to(means))

    # ---- what the steps share --------------------------------------------------------------------------

    def _skeleton(self, candidate: int, reference: ReferenceTrajectory) -> Tensor:
        """The full rows (T, B) that a candidate starts from."""
        if self.warm_start is not None:
            return self.warm_start
        num_steps = self.diffusion.num_timesteps
        leading = self.budget.leading_steps(num_steps) if self.settings.method.pool else 1
        skeletons = self.budget.skeletons(num_steps, *self.candidates[candidate], leading)
        return search.best_of(reference, skeletons, self.num_terms, distributed.mean)

    def _choose(self, training: EndToEndTraining, reference: ReferenceTrajectory) -> None:
        candidates = list(training.candidates)
        training.choose(search.best_of(reference, candidates, self.num_terms, distributed.mean))

    def _fit(self, reference: ReferenceTrajectory, compute: Tensor) -> search.Fit:
        return search.fit(reference, compute, self.num_terms, distributed.mean)

    def _effects(self, training: EndToEndTraining, batch: Batch) -> tuple[Tensor, search.Fit]:
        """Effects (T, B) of toggles, infinite where not asked for, and the schedule fitted as it is."""
        method, compute = self.settings.method, training.compute
        fitted, asked = self._fit(batch.reference, compute), None
        if method.open_share < 1:
            seed = self.settings.global_seed
            generator = sample_generator(seed, TRAINING_STREAM, training.round)
            asked = torch.rand(compute.shape, generator=generator) < method.open_share
            asked[-1] = False
        effects = toggle_effects(
            batch.reference, compute, fitted.reuse_weights.to(batch.reference.noise), self.num_terms <= 1,
            batch.generators, asked, recompute=not method.keep_activations,
        )  # fmt: skip
        effects = distributed.mean(effects).cpu()
        if asked is not None:
            effects[~asked] = torch.inf
        return effects, fitted

    def _outcome(self, training: EndToEndTraining, fitted: search.Fit) -> TrainStep:
        """A step of the older search as it is logged; training goes on from its fitted weights."""
        if self.num_terms and math.isfinite(fitted.error):
            training.start_moving(fitted)
        return self._logged(training, training.compute, fitted.error)

    def _logged(self, training: Training, compute: Tensor, error: float) -> TrainStep:
        """A step of a search that ends at this schedule (T, B) and error of x_0."""
        self._check_finite(error, training.train_steps + 1)
        own = torch.tensor(error, device=training.device)
        return TrainStep(0, own.clamp(min=LEAST_ERROR).log(), own, compute.sum().to(own))

    @torch.no_grad()
    def _error(self, reference: ReferenceTrajectory, cache: GatedCache) -> float:
        """Mean squared error of x_0, over the samples of all ranks."""
        (errors,) = reference.errors(cache)
        return distributed.mean(errors.mean()).item()

    @staticmethod
    def _check_finite(error: float, train_step: int) -> None:
        if not math.isfinite(error):
            raise ValueError(
                f"the error of x_0 is {error} at train step {train_step}; check the model's weights, or use "
                "--precision fp32"
            )

    # ---- batches ---------------------------------------------------------------------------------------

    def _reference(self, generators: list[torch.Generator]) -> ReferenceTrajectory:
        return self._start(generators).sampled()

    def _start(self, generators: list[torch.Generator]) -> ReferenceTrajectory:
        """Fresh samples whose uncached trajectory is not sampled yet."""
        noise, labels = self.draw(generators)
        sampler, cfg_scale = self.with_noise(generators), self.settings.method.cfg_scale
        return ReferenceTrajectory(self.model, sampler, noise, labels, cfg_scale)

    def _sample_generators(self, number: int, indices: Iterable[int]) -> list[torch.Generator]:
        """Generators of samples by their index in what round `number` draws."""
        seed = self.settings.global_seed
        return [sample_generator(seed, TRAINING_STREAM, number, index) for index in indices]

    def _pool_samples(self, first: int, indices: list[int]) -> ReferenceTrajectory:
        """Samples by their index in the pool that begins with round `first`."""
        return self._reference(self._sample_generators(first, indices))

    def _draw_from_pool(self, number: int, part: int = 0) -> ReferenceTrajectory:
        """A batch of the pool that round `number` draws from, by importance. part: which of its batches."""
        first = number - number % POOL_ROUNDS
        if self._pool is None or self._pool[0] != first:
            self._pool = first, self._inclusion(first)
        rank, world_size = self.processes.rank, self.processes.world_size
        generator = sample_generator(
            self.settings.global_seed, TRAINING_STREAM, number, *([part] if part else [])
        )
        indices, importance = systematic_sample(self._pool[1], generator)
        local = len(indices) // world_size
        own = slice(rank * local, (rank + 1) * local)
        reference = self._pool_samples(first, indices[own].tolist())
        return dataclasses.replace(reference, importance=importance[own].to(self.processes.device))

    def _inclusion(self, first: int) -> Tensor:
        """Probabilities (P,) of the samples of the pool that begins with round `first`.

        They follow the errors of a regular schedule, which does not depend on the training so far.
        """
        size, rank, world_size = self.settings.method.pool, self.processes.rank, self.processes.world_size
        compute = self.budget.skeletons(self.diffusion.num_timesteps, 1.0, warps=(1.0,))[0]
        reuse_weights, errors = None, torch.zeros(size, device=self.processes.device)
        batches = torch.arange(rank, size, world_size).split(self.settings.num_samples // world_size)
        for indices in tqdm(batches, desc="pool", leave=False, disable=True if rank else None):
            reference = self._pool_samples(first, indices.tolist())
            if reuse_weights is None:
                reuse_weights = self._fit(reference, compute).reuse_weights.to(reference.noise)
            with torch.no_grad():
                (errors[indices],) = reference.errors(GatedCache(compute.to(reference.noise), reuse_weights))
        return inclusion(distributed.mean(errors).cpu(), self.settings.num_samples)
