"""Calibration: reuse weights for a static schedule, solved on samples."""

import pytest
import torch

from backbones.loading import load_model
from diffusion import create_diffusion
from sampling.loop import Trajectory, generate_seeded
from schedules.baselines import fora_schedule
from schedules.calibrate import calibrated


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
