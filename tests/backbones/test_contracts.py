"""The contracts: every loop runs on a backbone of another shape and on a solver with a history."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.denoiser import Denoiser, executed, walk
from cache import GatedCache, SoftCache
from diffusion import State
from end_to_end.trajectory import ReferenceTrajectory, toggle_effects
from objectives import (
    PROXY_DEFINITIONS,
    Variant,
    image_error_proxy,
    step_errors,
    train_pair,
    train_trajectory,
)
from router import Router
from sampling.loop import Trajectory, generate_seeded, sample
from sampling.seeds import draw_labels, draw_noise, sample_generator
from schedules.baselines import fora_schedule
from schedules.calibrate import calibrated

NUM_STEPS, NUM_LAYERS, WIDTH = 6, 3, 5


class Sequences(nn.Module):
    """A backbone of sequences (N, 2, 7): per layer three branches, guidance as [uncond; cond] by a table."""

    branches = tuple(f"{layer}.{kind}" for layer in range(NUM_LAYERS) for kind in ("self", "cross", "ff"))
    num_branches = len(branches)
    branch_macs, other_macs, branch_size, prepared_size = (3, 5, 7) * NUM_LAYERS, 11, 7 * WIDTH, 1
    sample_shape, num_classes, has_null_label, learn_sigma = (2, 7), 4, True, False

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(self.num_classes + 1, WIDTH)
        self.into, self.out = nn.Linear(2, WIDTH), nn.Linear(WIDTH, 2)
        self.branch_modules = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in self.branches)
        self.functions, self.add = [self.run] * self.num_branches, torch.add

    dtype = property(lambda self: self.out.weight.dtype)
    device = property(lambda self: self.out.weight.device)
    frozen = property(lambda self: not any(one.requires_grad for one in self.parameters()))

    def condition(self, labels: Tensor, guided: bool) -> Tensor:
        null = torch.full_like(labels, self.num_classes)
        return torch.cat([null, labels]) if guided else labels

    def embed_timesteps(self, timesteps: Tensor) -> Tensor:
        return timesteps.to(self.dtype)

    def prepare(self, embedded: Tensor, condition: Tensor, computed=None) -> list[Tensor]:
        assert computed is None or len(computed) == len(embedded)
        return [torch.sin(t * self.table(condition)) for t in embedded]

    @staticmethod
    def run(x: Tensor, prepared: Tensor, module: nn.Module) -> Tensor:
        return torch.tanh(module(x + prepared[:, None]))

    def predict(self, x: Tensor, prepared: Tensor, cache=None) -> Tensor:
        x = self.into(x.mT)  # (N, 7, WIDTH)
        for index, module in enumerate(self.branch_modules):
            compute = partial(self.functions[index], x, prepared, module)
            x = self.add(x, compute() if cache is None else cache(index, compute))
        return self.out(x).mT

    def guide(self, output: Tensor, cfg_scale: float) -> Tensor:
        uncond, cond = output.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([guided, guided])

    def predicted_noise(self, output: Tensor) -> Tensor:
        return output

    def wrap_branches(self, wrap) -> None:
        self.functions = list(map(wrap, self.functions))

    def wrap_additions(self, wrap) -> None:
        self.add = wrap(self.add)


class TwoStep:
    """Adams-Bashforth of second order: its history is the last output."""

    num_steps, adds_noise = NUM_STEPS, False

    def timestep(self, step: int) -> float:
        return (step + 1) / self.num_steps

    def start(self, x: Tensor) -> State:
        return State(x)

    def add_noise(self, x_0: Tensor, step: int, noise: Tensor) -> State:
        return State(x_0 + self.timestep(step) * noise)

    def step(self, output: Tensor, state: State, _step: int, _noise: Tensor | None = None) -> State:
        slope = 1.5 * output - 0.5 * state.history[0] if state.history else output
        return State(state.x - slope / self.num_steps, (output,))


@pytest.fixture
def backbone() -> Sequences:
    torch.manual_seed(0)
    return Sequences().double().requires_grad_(False)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, 7, generator=generator, dtype=torch.float64), torch.tensor([0, 3, 1])


def by_hand(model, noise: Tensor, labels: Tensor, cfg_scale: float, cache=None) -> list[Tensor]:
    """x after every step, the noisiest first, with nothing of the program's loops."""
    null, last, x, seen = torch.full_like(labels, 4), None, noise, []
    for step in range(NUM_STEPS - 1, -1, -1):
        if cache is not None:
            cache.step = step
        t = (step + 1) / NUM_STEPS
        both = labels if cfg_scale == 1 else torch.cat([null, labels])
        rows = x if cfg_scale == 1 else torch.cat([x, x])
        out = model.predict(rows, torch.sin(t * model.table(both)), cache)
        if cfg_scale != 1:
            uncond, cond = out.chunk(2)
            out = uncond + cfg_scale * (cond - uncond)
        x = x - (out if last is None else 1.5 * out - 0.5 * last) / NUM_STEPS
        last = out
        seen.append(x)
    return seen


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_sampling(backbone, batch, cfg_scale):
    noise, labels = batch
    schedule = fora_schedule(NUM_STEPS, 9, 2)
    x_0 = sample(Trajectory(backbone, TwoStep(), cfg_scale), labels, noise)
    torch.testing.assert_close(x_0, by_hand(backbone, noise, labels, cfg_scale)[-1])
    trajectory = Trajectory(backbone, TwoStep(), cfg_scale, schedule)
    cached = sample(trajectory, labels, noise)
    torch.testing.assert_close(cached, by_hand(backbone, noise, labels, cfg_scale, trajectory.cache())[-1])
    assert (cached - x_0).abs().max() > 1e-3


def test_seeded_sampling_draws_the_backbones_shape(backbone):
    backbone = backbone.float()
    generators = [sample_generator(5, 0, k) for k in range(4)]
    noise, labels = draw_noise(backbone, generators), draw_labels(backbone, generators)
    assert noise.shape == (4, 2, 7)
    x_0 = generate_seeded(Trajectory(backbone, TwoStep()), labels, seed=5, batch_size=3)
    torch.testing.assert_close(x_0, by_hand(backbone, noise, labels, 1.0)[-1])


def test_calibration(backbone):
    plain = fora_schedule(NUM_STEPS, 9, 3)
    solved = calibrated(Trajectory(backbone.float(), TwoStep(), 3.0, plain), 2, 8)
    assert torch.equal(solved.compute, plain.compute)
    assert solved.weights[0].abs().max() > 0.1


@pytest.mark.parametrize("definition", PROXY_DEFINITIONS)
def test_proxy(backbone, batch, definition):
    """From the definition, with trajectories that share nothing: the history is branched rightly."""
    noise, labels = batch
    router = Router(NUM_STEPS, 9, torch.Generator().manual_seed(3)).double()

    def x0(routed: set[int]) -> Tensor:
        scores = router.scores().detach().clone()
        scores[[step for step in range(NUM_STEPS) if step not in routed]] = 1.0
        denoise = Denoiser(backbone, TwoStep(), labels, 3.0)
        cache = SoftCache(scores, 0.4)
        *_, (_, state) = walk(
            partial(denoise.advance, cache=cache), denoise.start(noise), executed(NUM_STEPS)
        )
        return state.x

    last = NUM_STEPS - 1
    if definition == "paper":
        pairs = [(x0(set(range(last)) - {i}), x0(set(range(last)))) for i in range(last)]
    else:
        pairs = [(x0(set(range(i, last))), x0(set(range(i + 1, last)))) for i in range(last)]
    wanted = [(a - b).square().mean() for a, b in pairs]
    with torch.no_grad():
        proxy = image_error_proxy(backbone, TwoStep(), router, noise, labels, 3.0, 0.4, definition)
    torch.testing.assert_close(proxy[:-1], torch.stack(wanted), rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", [Variant(), Variant(one_step=True), Variant(straight_through=True)])
def test_step_wise_training(backbone, batch, variant):
    noise, labels = batch
    router = Router(NUM_STEPS, 9, torch.Generator().manual_seed(3)).double()
    before = router.logits.detach().clone()
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    ones = torch.ones(NUM_STEPS, dtype=torch.float64)
    setting = backbone, TwoStep(), router, optimizer, noise, labels, 3.0, 0.5, ones, 1e-3, variant
    updates = list(train_trajectory(*setting))
    assert [update.step for update in updates] == list(range(NUM_STEPS - 2, -1, -1))
    assert all(update.data_loss > 0 for update in updates)
    assert ((router.logits != before).sum(1) > 0).tolist() == [True] * (NUM_STEPS - 1) + [False]


def test_pairs_and_step_errors(backbone, batch):
    noise, labels = batch
    router = Router(NUM_STEPS, 9, torch.Generator().manual_seed(3)).double()
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    update = train_pair(backbone, TwoStep(), router, optimizer, noise, noise.flip(0), labels, 3, 0.1, 1e-3)
    assert update.step == 2
    assert update.data_loss > 0
    errors, _ = step_errors(backbone, TwoStep(), fora_schedule(NUM_STEPS, 9, 2), noise, labels, 3.0)
    assert (errors > 0).tolist() == [step % 2 == 0 for step in range(NUM_STEPS)]


@pytest.mark.parametrize("recompute", [False, True])
def test_errors_of_the_image_are_differentiable(backbone, batch, recompute):
    """The gradient with respect to a gate and to a weight, against finite differences."""
    noise, labels = batch
    reference = ReferenceTrajectory.draw(backbone, TwoStep(), noise, labels, 3.0)
    torch.testing.assert_close(reference.states[0], by_hand(backbone, noise, labels, 3.0)[-1])
    generator = torch.Generator().manual_seed(0)
    gates = torch.rand(NUM_STEPS, 9, generator=generator, dtype=torch.float64)
    weights = torch.randn(NUM_STEPS, 9, 2, generator=generator, dtype=torch.float64)

    def error(gates: Tensor, weights: Tensor) -> Tensor:
        return reference.errors(GatedCache(gates, weights), recompute)[0].mean()

    tensors = gates.requires_grad_(), weights.requires_grad_()
    gradients = torch.autograd.grad(error(*tensors), tensors)
    for which, cell in ((0, (2, 4)), (1, (1, 7, 1))):
        moved = [copy.deepcopy(one.detach()) for one in tensors]
        moved[which][cell] += 1e-5
        above = error(*moved)
        moved[which][cell] -= 2e-5
        slope = (above - error(*moved)) / 2e-5
        torch.testing.assert_close(gradients[which][cell], slope.detach(), rtol=1e-5, atol=1e-10)


def test_toggles_and_windows(backbone, batch):
    noise, labels = batch
    reference = ReferenceTrajectory.draw(backbone, TwoStep(), noise, labels, 1.0)
    table = fora_schedule(NUM_STEPS, 9, 2).compute
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(NUM_STEPS, 9, 1)
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    effects = toggle_effects(reference, table, weights, True, generators)
    assert effects.shape == table.shape
    assert effects[:-1].isfinite().all()
    gated = GatedCache(table.double(), weights.requires_grad_())
    assert len(reference.errors(gated, window=2)) == NUM_STEPS // 2


def test_branches_are_wrapped_by_the_contract(backbone, batch):
    noise, labels = batch
    calls = []

    def counting(function):
        return lambda *inputs: calls.append(1) or F.hardtanh(function(*inputs), -9, 9)

    plain = sample(Trajectory(backbone, TwoStep()), labels, noise)
    backbone.wrap_branches(counting)
    assert torch.equal(sample(Trajectory(backbone, TwoStep()), labels, noise), plain)
    assert len(calls) == 9 * NUM_STEPS
