"""`--method end-to-end --any-speed`: one router for every speed-up, trained for all of them at once.

The first train step is the linear search, down to the highest speed-up: its order of cells is the schedule of
every lower one. Each update draws a speed-up, and moves the weights of reuse of the two anchors next to it.
"""

import torch
from torch import nn

from backbones.contract import Backbone
from cache import GatedCache
from common import distributed
from end_to_end import linear, search
from end_to_end.rounds import Batch, EndToEnd, Phase
from objectives import TrainStep
from router import Router, Schedule
from sampling.seeds import TRAINING_STREAM, sample_generator
from schedules.any_speed import AnySpeed, speedup_macs
from training.state import Training
from training.target import Target

LEAST, MOST, ANCHORS = 1.2, 4.0, 8  # speed-ups by MACs, and the number of those with moves of their own
SHOWN = 2.0  # the speed-up whose schedule the log and the picture show


def anchors(most: float) -> tuple[float, ...]:
    """Speed-ups in equal ratios, from LEAST to MOST or to `most`. Raises ValueError where there are none."""
    if most <= LEAST:
        raise ValueError(
            f"--any-speed begins at a speed-up of {LEAST:g}, and the steps allow a speed-up of {most:.3g} at "
            "most; take more --num-sampling-steps"
        )
    highest = min(MOST, most)
    return tuple(round(LEAST * (highest / LEAST) ** (k / (ANCHORS - 1)), 4) for k in range(ANCHORS))


def highest_speedup(model: Backbone, num_steps: int, num_terms: int) -> float:
    """By MACs, of the schedule that computes its first step alone."""
    compute = torch.zeros(num_steps, model.num_branches, dtype=torch.bool)
    compute[-1] = True
    return speedup_macs(compute, num_terms, model)


class AnySpeedTraining(Training):
    """The order of cells, gram matrices, and the moves (A, T, B, K) that Adam sees."""

    def __init__(self, model, num_steps: int, num_terms: int, speedups: tuple[float, ...], lr: float, device):
        super().__init__(1, None)
        num_branches = model.num_branches
        self.model, self.speedups, self.device = model, speedups, device
        self.rank = torch.full((num_steps, num_branches), -1)  # place in the order; -1: never closed
        self.gram = torch.zeros(num_branches, num_steps, num_steps, dtype=torch.float64)
        self.moves = nn.Parameter(
            torch.zeros(len(speedups), num_steps, num_branches, num_terms, device=device)
        )
        self.optimizer = torch.optim.Adam([self.moves], lr=lr, betas=(0.9, 0.99), fused=True)
        distributed.average_gradients(self.optimizer)
        for name in ("rank", "gram", "moves"):
            self.state.add_attribute(self, name)
        self.state.add_adam(self.optimizer, self.moves)
        self._known: dict = {}

    @property
    def any_speed(self) -> AnySpeed:
        closed = (self.rank >= 0).nonzero()
        order = closed[self.rank[self.rank >= 0].argsort()]
        facts = {name: getattr(self.model, name) for name in ("branch_macs", "other_macs", "branch_size")}
        return AnySpeed(order, self.gram, self.moves, self.speedups, **facts, _fits=self._known)

    @property
    def schedule(self) -> Schedule:
        return self.any_speed.schedule(min(SHOWN, self.speedups[-1]))

    @property
    def router_to_save(self) -> Router:
        return self.any_speed.router()


class AnySpeedRounds(EndToEnd):
    """Training of one router for every speed-up."""

    def __init__(self, settings, processes, model, diffusion, target):
        num_steps = diffusion.num_timesteps
        self.speedups = anchors(0.99 * highest_speedup(model, num_steps, settings.method.terms))
        # A pool is drawn by the errors of a regular schedule of the middle of the speed-ups.
        target = Target("speedup", self.speedups[ANCHORS // 2], model, num_steps)
        super().__init__(settings, processes, model, diffusion, target)
        self.target = None

    @property
    def name(self) -> str:
        return "end-to-end+any-speed"

    def new_training(self) -> AnySpeedTraining:
        num_steps, lr = self.diffusion.num_timesteps, self.settings.method.lr
        device = self.processes.device
        return AnySpeedTraining(self.model, num_steps, self.num_terms, self.speedups, lr, device)

    def _plan(self) -> list[Phase]:
        return [Phase(1, self._order), Phase(self.total_steps - 1, self._update_one)]

    def _order(self, training: AnySpeedTraining, batch: Batch, _number: int) -> TrainStep:
        """The order of all cells, and the moves that the linearised error asks for at each anchor."""
        tables = linear.Linearised(*self._tables(training.round), self.num_terms)
        num_steps = self.diffusion.num_timesteps
        highest = Target("speedup", self.speedups[-1], self.model, num_steps)
        order = tables.closing_order(search.Budget.of(highest, self.num_terms))
        for number, cell in enumerate(order):
            training.rank[cell] = number
        training.gram = tables.gram
        router = training.any_speed
        solved = [tables.solve(router.compute(speedup))[0] for speedup in self.speedups]
        with torch.no_grad():
            training.moves.copy_(torch.stack(solved))
        schedule = training.schedule
        noise = batch.reference.noise
        cache = GatedCache(schedule.compute.to(noise), schedule.weights.to(noise))
        return self._logged(training, schedule.compute, self._error(batch.reference, cache))

    def _update_one(self, training: AnySpeedTraining, batch: Batch, number: int) -> TrainStep:
        """An update at a speed-up drawn evenly in its logarithm."""
        router, drawn = training.any_speed, self._draw_speedup(training.round)
        compute = router.compute(drawn)
        weights = router.reuse_weights(compute, router.interpolated_moves(drawn))
        left = self.total_steps - 1
        return self._descend(training.optimizer, batch.reference, compute, weights, number, left)

    def _draw_speedup(self, number: int) -> float:
        generator = sample_generator(self.settings.global_seed, TRAINING_STREAM, number)
        least, most = self.speedups[0], self.speedups[-1]
        return least * (most / least) ** torch.rand((), generator=generator).item()


def rounds(settings, *others) -> EndToEnd:
    """The rounds of `--method end-to-end`: for one speed-up, or for every one."""
    return (AnySpeedRounds if settings.method.any_speed else EndToEnd)(settings, *others)


ROUNDS = {"end-to-end": rounds}
