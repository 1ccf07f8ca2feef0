"""Solvers beside diffusers' schedulers, step by step; their state is a value, and they are differentiable."""

import diffusers
import pytest
import torch
from torch import Tensor

from backbones.denoiser import arrive, executed
from diffusion import DDIM, DDPM, Sampler, create_diffusion
from diffusion.solvers import DPMSolverPP, FlowEuler, SASolver

SHAPE = (2, 3, 4, 4)
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def draw(seed: int, dtype=torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def model(x: Tensor, t: float, weight=0.7) -> Tensor:
    """Something smooth that depends on x and t."""
    return torch.tanh(weight * x + t / 1000)


def trajectory(sampler: Sampler, dtype=torch.float32, weight=0.7) -> list[Tensor]:
    found: list[Tensor] = []

    def advance(state, step):
        noise = draw(100 + step, dtype) if sampler.adds_noise else None
        state = sampler.step(model(state.x, sampler.timestep(step), weight), state, step, noise)
        found.append(state.x)
        return state

    arrive(advance, sampler.start(draw(0, dtype)), executed(sampler.num_steps))
    return found


SAMPLERS = {
    "ddim": lambda steps: DDIM(create_diffusion(str(steps), learn_sigma=False)),
    "ddpm": lambda steps: DDPM(create_diffusion(str(steps), learn_sigma=False)),
    "dpm-solver++": lambda steps: DPMSolverPP(create_diffusion(str(steps), learn_sigma=False)),
    "sa-solver": lambda steps: SASolver(create_diffusion(str(steps), learn_sigma=False)),
    "flow-euler": FlowEuler.shifted,
}


@pytest.mark.parametrize("num_steps", [2, 6, 20, 50])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("dpm-solver++", diffusers.DPMSolverMultistepScheduler(**LINEAR)),
        ("sa-solver", diffusers.SASolverScheduler(**LINEAR)),
        ("flow-euler", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    ],
)
def test_steps_are_those_of_diffusers(name, scheduler, num_steps, monkeypatch):
    sampler = SAMPLERS[name](num_steps)
    found = trajectory(sampler)
    noises = iter([draw(100 + step) for step in executed(num_steps)])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_sasolver.randn_tensor", lambda *_, **__: next(noises)
    )
    scheduler.set_timesteps(num_steps)
    assert [sampler.timestep(step) for step in executed(num_steps)] == pytest.approx(
        scheduler.timesteps.tolist(), rel=1e-6
    )
    x = draw(0)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(model(x, t.item()), t, x, return_dict=False)[0]
        assert (found[k] - x).abs().max() < 2e-6 * max(1.0, x.abs().max()), k


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_state_is_a_value(name):
    """A trajectory that branches: the other branch changes nothing, and replaying gives the same."""
    sampler = SAMPLERS[name](6)

    def advance(state, step, offset=0.0):
        noise = draw(100 + step) if sampler.adds_noise else None
        return sampler.step(model(state.x, sampler.timestep(step)) + offset, state, step, noise)

    middle = arrive(advance, sampler.start(draw(0)), range(5, 2, -1))
    first = arrive(advance, middle, range(2, -1, -1)).x
    other = arrive(lambda state, step: advance(state, step, 0.5), middle, range(2, -1, -1)).x
    again = arrive(advance, middle, range(2, -1, -1)).x
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first, trajectory(sampler)[-1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_gradients_are_finite_differences(name):
    """Through six steps, in float64."""
    sampler = SAMPLERS[name](6)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def loss(value):
        return trajectory(sampler, torch.float64, value)[-1].square().mean()

    (gradient,) = torch.autograd.grad(loss(weight), weight)
    with torch.no_grad():
        difference = (loss(weight + 1e-5) - loss(weight - 1e-5)) / 2e-5
    assert gradient.item() == pytest.approx(difference.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["dpm-solver++", "sa-solver", "flow-euler"])
def test_noised_data_with_its_own_noise_leads_back(name):
    """add_noise puts x_0 on the line between data and noise that the solver's levels describe."""
    sampler, x_0, noise = SAMPLERS[name](20), draw(1), draw(2)
    first = sampler.add_noise(x_0, 19, noise).x
    last = sampler.add_noise(x_0, 0, noise).x
    assert (first - noise).abs().max() < 0.1 * noise.abs().max()
    assert (last - x_0).abs().max() < 0.5 * (first - x_0).abs().max()
    if name == "dpm-solver++":  # the true noise as the model's output: the exact x_0 at the end
        state = sampler.add_noise(x_0, 19, noise)
        state = arrive(lambda one, step: sampler.step(noise, one, step), state, executed(20))
        assert torch.allclose(state.x, x_0, atol=1e-4)
