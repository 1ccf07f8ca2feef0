"""`--method end-to-end`: a schedule and its weights of reuse, trained on the error of the final image.

A train step is one of three, each on fresh noise, and each resumable:

| train steps | what happens |
|---|---|
| 4 per candidate | a skeleton of full rows grows by cells towards the budget (`search.py`) |
| 5 | the best candidate exchanges cells, kept where the error falls |
| all that are left | one Adam step on all weights of reuse at once, on the log of the MSE of x_0 |

With `--terms 0` (reuse as stored) there are no weights, and exchanges take all that is left. Why it is built
so, and what did worse, is in docs/beyond.md.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from backbones.loading import is_latent
from cache import GatedCache
from common import distributed
from end_to_end import search
from end_to_end.importance import inclusion, systematic_sample
from end_to_end.trajectory import Paired, toggle_effects
from objectives import TrainStep
from router import Router, Schedule, load_router, weights_read
from sampling.seeds import TRAINING_STREAM, sample_generator
from training.rounds import Rounds
from training.state import Training
from training.target import Target

LEAST_ERROR = 1e-12
POOL_ROUNDS = 32  # that draw from one pool
GROWTHS, EXCHANGES = 4, 5  # train steps of a candidate, and of the chosen one


class EndToEndTraining(Training):
    """Candidate schedules (C, T, B), of which `current` is at work, and the weights of the chosen one.

    The weights are `fitted + scale @ moves`: `moves` is what Adam sees, see `search.moving_scale`.
    """

    def __init__(
        self, num_tables: int, size: tuple[int, int], num_terms: int, lr: float, target: Target, device
    ):
        super().__init__(1, target)
        terms = max(1, num_terms)
        self.num_terms, self.device = num_terms, device
        self.tables = torch.zeros(num_tables, *size, dtype=torch.bool)
        self.tables[:, -1] = True
        self.current, self.part = 0, search.EXCHANGED
        self.fitted = torch.zeros(*size, terms, device=device)
        self.fitted[..., 0] = 1
        self.scale = torch.zeros(*size, terms, terms, device=device)
        self.moves = nn.Parameter(torch.zeros(*size, terms, device=device))
        self.optimizer = torch.optim.Adam([self.moves], lr=lr, betas=(0.9, 0.99), fused=True)
        distributed.average_gradients(self.optimizer)
        for name in ("tables", "current", "part", "fitted", "scale", "moves"):
            self.state.add_attribute(self, name)
        self.state.add_adam(self.optimizer, self.moves)

    @property
    def table(self) -> Tensor:
        return self.tables[self.current]

    @table.setter
    def table(self, table: Tensor) -> None:
        self.tables[self.current] = table

    def weights(self) -> Tensor:
        """(T, B, K), differentiable in `moves`."""
        return self.fitted + (self.scale @ self.moves[..., None])[..., 0]

    def start_moving(self, fitted: search.Fit) -> None:
        """From here on the weights move away from the fitted ones, those of reused cells alone."""
        used = weights_read(self.table, max(1, self.num_terms))
        plain = torch.zeros_like(fitted.weights)
        plain[..., 0] = 1
        reused = used.any(-1, keepdim=True)
        self.fitted = torch.where(reused, fitted.weights * used, plain).float().to(self.device)
        scale = search.moving_scale(fitted) * used[..., None]
        self.scale = scale.float().to(self.device)

    @property
    def schedule(self) -> Schedule:
        weights = self.weights().detach() if self.num_terms else None
        return Schedule(self.table, "end-to-end", weights)

    @property
    def router_to_save(self) -> Router:
        return Router.from_schedule(self.schedule)


class EndToEnd(Rounds):
    """Needs no images."""

    steps_per_round = 1
    extra_steps = 0.0  # the budget is met by construction

    def __init__(self, settings, processes, model, diffusion, target):
        super().__init__(settings, processes, model, diffusion, target)
        args = self.args = settings.method
        self.budget = search.Budget.of(target, args.terms)
        self.warm_start = self._pool = None
        if args.init:
            router = load_router(args.init, settings.model.model, num_branches=model.num_branches)
            source = router.schedule(router.info.get("threshold", 0.1))
            self.warm_start = search.interpolated(source.compute, diffusion.num_timesteps)
        num_steps = diffusion.num_timesteps
        self.candidates = self.budget.early_candidates(num_steps) if args.pool else search.CANDIDATES
        self.num_tables = 1 if args.init else len(self.candidates)
        self.num_growths = self.num_tables * GROWTHS
        # What an exchange gains on one batch by importance is lost on the next.
        self.num_exchanges = 0 if args.pool and args.terms else EXCHANGES
        self.search_steps = self.num_growths + max(1, self.num_exchanges)
        if args.max_steps < self.search_steps:
            raise ValueError(
                f"--max-steps {args.max_steps} ends within the search, which takes {self.search_steps}; "
                "give more"
            )

    @property
    def total_steps(self) -> int:
        return self.args.max_steps

    @property
    def name(self) -> str:
        return "end-to-end+forecast" if self.args.terms else "end-to-end"

    def new_training(self) -> EndToEndTraining:
        args, size = self.args, (self.diffusion.num_timesteps, self.model.num_branches)
        return EndToEndTraining(
            self.num_tables, size, args.terms, args.lr, self.target, self.processes.device
        )

    def run(self, training: EndToEndTraining) -> Iterator[TrainStep | None]:
        generators, step = self.generators(training.round), training.train_steps
        paired = self._from_pool(training.round) if self.args.pool else self._paired(generators)
        if step < self.num_growths:
            yield self._grow(training, paired, generators)
        elif step < self.search_steps or not self.args.terms:
            if step == self.num_growths:
                self._choose(training, paired)
            if self.num_exchanges:
                yield self._exchange(training, paired, generators)
            else:
                yield self._outcome(training, self._fit(paired, training.table))
        else:
            yield self._update(training, paired, step - self.search_steps)

    def _paired(self, generators: list) -> Paired:
        return Paired.draw(self.model, self.diffusion, *self.draw(generators), self.args.cfg_scale)

    def _from_pool(self, number: int) -> Paired:
        """A batch of the pool that round `number` draws from, by importance."""
        first = number - number % POOL_ROUNDS
        if self._pool is None or self._pool[0] != first:
            self._pool = first, self._inclusion(first)
        processes = self.processes
        generator = sample_generator(self.settings.global_seed, TRAINING_STREAM, number)
        indices, importance = systematic_sample(self._pool[1], generator)
        local = len(indices) // processes.world_size
        own = slice(processes.rank * local, (processes.rank + 1) * local)
        keys = ((TRAINING_STREAM, first, index) for index in indices[own].tolist())
        paired = self._paired([sample_generator(self.settings.global_seed, *key) for key in keys])
        return dataclasses.replace(paired, importance=importance[own].to(processes.device))

    def _inclusion(self, first: int) -> Tensor:
        """Probabilities (P,) of the pool that begins with round `first`.

        In proportion to the errors of a regular schedule, which does not depend on the training so far.
        """
        args, rank, world_size = self.args, self.processes.rank, self.processes.world_size
        table = self.budget.skeletons(self.diffusion.num_timesteps, 1.0, warps=(1.0,))[0]
        weights, errors = None, torch.zeros(args.pool, device=self.processes.device)
        batches = torch.arange(rank, args.pool, world_size).split(self.settings.num_samples // world_size)
        for part in tqdm(batches, desc="pool", leave=False, disable=True if rank else None):
            keys = ((TRAINING_STREAM, first, index) for index in part.tolist())
            paired = self._paired([sample_generator(self.settings.global_seed, *key) for key in keys])
            if weights is None:
                weights = self._fit(paired, table).weights.to(paired.noise)
            with torch.no_grad():
                (errors[part],) = paired.errors(GatedCache(table.to(paired.noise), weights))
        return inclusion(distributed.mean(errors).cpu(), self.settings.num_samples)

    def _grow(self, training: EndToEndTraining, paired: Paired, generators: list) -> TrainStep:
        """One growth of one candidate: the first builds its skeleton, the last meets the budget."""
        training.current, growth = divmod(training.train_steps, GROWTHS)
        if growth == 0:
            training.table = self._skeleton(training.current, paired)
        effects, _ = self._effects(training, paired, generators)
        spent = self.budget.spent(training.table)
        goal = spent + (self.budget.allowed - spent) / (GROWTHS - growth)
        training.table = search.spending(training.table, effects, self.budget, goal)
        return self._outcome(training, self._fit(paired, training.table))

    def _skeleton(self, candidate: int, paired: Paired) -> Tensor:
        if self.warm_start is not None:
            return self.warm_start
        num_steps = self.diffusion.num_timesteps
        first = self.budget.early_steps(num_steps) if self.args.pool else 1
        tables = self.budget.skeletons(num_steps, *self.candidates[candidate], first)
        return search.best_of(paired, tables, self.args.terms, distributed.mean)

    def _choose(self, training: EndToEndTraining, paired: Paired) -> None:
        best = search.best_of(paired, list(training.tables), self.args.terms, distributed.mean)
        training.current, training.tables[0] = 0, best

    def _exchange(self, training: EndToEndTraining, paired: Paired, generators: list) -> TrainStep:
        """Keep an exchange that lowers the error on this batch; else the next one is half as large."""
        effects, fitted = self._effects(training, paired, generators)
        table = search.exchanged(training.table, effects, self.budget, training.part)
        changed = self._fit(paired, table)
        if changed.error < fitted.error:
            training.table, fitted = table, changed
        else:
            training.part /= 2
        return self._outcome(training, fitted)

    def _update(self, training: EndToEndTraining, paired: Paired, update: int) -> TrainStep:
        args = self.args
        (group,) = training.optimizer.param_groups
        group["lr"] = search.learning_rate(args.lr, update, args.max_steps - self.search_steps)
        gates = training.table.to(paired.noise)
        cache = GatedCache(gates, training.weights())
        deviations = paired.deviations(cache, not args.keep_activations, args.window)
        losses = errors = torch.stack([one.square().mean(1).mean() for one in deviations])
        if args.moments_weight:
            in_pixels, count = not is_latent(self.model), self.settings.num_samples
            moments = paired.moments(deviations[0], in_pixels, count, distributed.mean)
            losses = torch.cat([errors[:1] + args.moments_weight * moments, errors[1:]])
        # The loss is the logarithm of the mean over all ranks: the mean of their own logarithms is another.
        of_all = distributed.mean(torch.stack([losses.detach(), errors.detach()]))
        of_all = of_all.clamp(min=LEAST_ERROR)  # a window of computed steps has none
        training.optimizer.zero_grad()
        (losses / of_all[0]).mean().backward()
        training.optimizer.step()
        return TrainStep(0, of_all[0].log().mean(), of_all[1, 0], training.table.sum().to(of_all))

    def _fit(self, paired: Paired, table: Tensor) -> search.Fit:
        return search.fit(paired, table, self.args.terms, distributed.mean)

    def _effects(
        self, training: EndToEndTraining, paired: Paired, generators: list
    ) -> tuple[Tensor, search.Fit]:
        """(T, B) what toggles would change, infinite where not asked, and the schedule fitted as it is."""
        args, table = self.args, training.table
        fitted = self._fit(paired, table)
        soft = None
        if args.open_share < 1:
            generator = sample_generator(self.settings.global_seed, TRAINING_STREAM, training.round)
            soft = torch.rand(table.shape, generator=generator) < args.open_share
            soft[-1] = False
        effects = toggle_effects(
            paired, table, fitted.weights.to(paired.noise), args.terms <= 1, generators, soft,
            recompute=not args.keep_activations,
        )  # fmt: skip
        effects = distributed.mean(effects).cpu()
        if soft is not None:
            effects[~soft] = torch.inf
        return effects, fitted

    def _outcome(self, training: EndToEndTraining, fitted: search.Fit) -> TrainStep:
        if not math.isfinite(fitted.error):
            raise ValueError(
                f"the error of x_0 is {fitted.error} at train step {training.train_steps + 1}; check the "
                "model's weights, or use --precision fp32"
            )
        if self.args.terms:
            training.start_moving(fitted)
        error = torch.tensor(fitted.error, device=training.device)
        return TrainStep(0, error.clamp(min=LEAST_ERROR).log(), error, training.table.sum().to(error))


ROUNDS: dict[str, type[Rounds]] = {"end-to-end": EndToEnd}
