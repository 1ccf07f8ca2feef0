"""Calibration: reuse weights for a static schedule, solved on samples."""

import pytest
import torch

from backbones.loading import load_model
from diffusion import create_diffusion
from sampling.loop import Trajectory, denoise_loop, generate_seeded
from sampling.seeds import CALIBRATION_STREAM, draw_labels, draw_noise, sample_generator
from schedules.baselines import fora_schedule
from schedules.calibrate import calibrated, dynamic_modes, linear


@pytest.mark.parametrize(("sampler", "cfg_scale", "share"), [("ddim", 1.5, 0.6), ("ddpm", 1.0, 0.9)])
def test_calibration_gives_a_static_schedule_its_weights(sampler, cfg_scale, share):
    model, diffusion, schedule = load_model("DiT-digits/2"), create_diffusion("10"), fora_schedule(10, 24, 2)
    options = {"cfg_scale": cfg_scale, "sampler": sampler}
    labels = torch.arange(20) % 10
    plain = generate_seeded(Trajectory.of(model, diffusion, **options), labels, 7)

    def error(schedule) -> float:
        trajectory = Trajectory.of(model, diffusion, schedule=schedule, **options)
        x_0 = generate_seeded(trajectory, labels, 7)
        return (x_0 - plain).square().mean().item()

    solved = calibrated(Trajectory.of(model, diffusion, schedule=schedule, **options), 3, 32)
    assert torch.equal(solved.compute, schedule.compute)
    assert error(solved) < share * error(schedule)


def test_linear_weights_are_those_of_an_uncached_trajectory():
    """With every other step computed, least squares on true outputs: by hand for one cell."""
    model, chain, schedule = load_model("DiT-digits/2"), create_diffusion("6"), fora_schedule(6, 24, 2)
    trajectory = Trajectory.of(model, chain, schedule=schedule)
    found = linear(trajectory, 2, 4).weights[2, 5]
    generators = [sample_generator(0, CALIBRATION_STREAM, k) for k in range(4)]
    noise, labels = draw_noise(model, generators), draw_labels(model, generators)
    outputs = {}

    class Watching:
        computed = None

        def __call__(self, branch, run):
            outputs[self.step, branch] = run()
            return outputs[self.step, branch]

    for _ in denoise_loop(Trajectory.of(model, chain), labels, noise, Watching()):
        pass
    stored = torch.stack([outputs[3, 5].flatten(), outputs[5, 5].flatten()], 1).double()
    expected = torch.linalg.lstsq(stored, outputs[2, 5].flatten()[:, None].double()).solution[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, calibrated(trajectory, 2, 4).weights[2, 5], rtol=1e-4)


def test_dynamic_modes_have_weights_for_every_reused_cell():
    model, chain, schedule = load_model("DiT-digits/2"), create_diffusion("8"), fora_schedule(8, 24, 2)
    weights = dynamic_modes(Trajectory.of(model, chain, schedule=schedule), 4).weights
    assert torch.equal(weights[6], torch.tensor([1.0, 0, 0]).expand(24, 3))  # one output is stored
    assert torch.equal(weights[4], torch.tensor([1.5, -0.5, 0]).expand(24, 3))  # two: a line
    assert not torch.equal(weights[2], weights[4])  # three: modes
    assert weights.isfinite().all()
