import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import DDIMScheduler, DDPMScheduler

from diffusion import create_diffusion, space_timesteps


@pytest.mark.parametrize("table", ["betas", "alphas_cumprod", "posterior_log_variance_clipped"])
def test_tables_match_the_released_ones(ten_steps, expected, table):
    assert relative_error(torch.from_numpy(getattr(ten_steps, table)), expected[f"diffusion.{table}"]) < 1e-12


def test_timestep_map_matches_the_released_one(ten_steps, expected):
    assert ten_steps.timestep_map == expected["diffusion.timestep_map"].tolist()


@pytest.mark.parametrize("spec", ["10,15,20", "250", "50", "ddim25", "ddim50"])
def test_respacing_matches_the_released_tables(expected, spec):
    assert space_timesteps(1000, spec) == expected[f"respacing.{spec}"].tolist()


def test_no_respacing_keeps_every_timestep():
    assert create_diffusion().timestep_map == list(range(1000))


@pytest.mark.parametrize("spec", ["0", "1001", "ddim999", "ddim0", "ten", "5,x", "ddim", "10,,10"])
def test_respacing_that_cannot_be_is_refused_by_name(spec):
    with pytest.raises(ValueError, match=spec):
        space_timesteps(1000, spec)


def test_ddim_equals_diffusers():
    """diffusers' default spacing is our "ddimT"."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(20)
    diffusion = create_diffusion("ddim20", learn_sigma=False)
    assert scheduler.timesteps.tolist() == diffusion.timestep_map[::-1]
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 4, 8, 8, generator=generator)
    for step in reversed(range(20)):
        output = torch.tanh(torch.randn(2, 4, 8, 8, generator=generator) + 0.3 * ours)
        ours = diffusion.ddim_step(output, ours, step)
        theirs = scheduler.step(output, diffusion.timestep_map[step], theirs).prev_sample
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_equals_diffusers(eta):
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    scheduler.set_timesteps(10)
    diffusion = create_diffusion("ddim10", learn_sigma=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    for step in (9, 4, 1):
        output, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
        timestep = diffusion.timestep_map[step]
        theirs = scheduler.step(output, timestep, x, eta=eta, variance_noise=noise).prev_sample
        assert relative_error(diffusion.ddim_step(output, x, step, eta, noise), theirs) < 1e-5


def test_ddpm_mean_and_learned_variance_equal_diffusers():
    """At step 0 diffusers adds no noise either."""
    scheduler = DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, variance_type="learned_range"
    )
    diffusion = create_diffusion("")
    generator = torch.Generator().manual_seed(0)
    for step in (999, 500, 1, 0):
        x = torch.randn(2, 3, 8, 8, generator=generator)
        output = torch.randn(2, 6, 8, 8, generator=generator)
        theirs = scheduler.step(output, step, x, generator=torch.Generator().manual_seed(step)).prev_sample
        noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        assert relative_error(diffusion.ddpm_step(output, x, step, noise), theirs) < 1e-4


def test_tensor_steps_equal_int_steps(ten_steps):
    """Training's per-sample steps go through the same posterior."""
    x, output = torch.randn(4, 4, 8, 8), torch.randn(4, 8, 8, 8)
    steps = torch.tensor([9, 0, 3, 3])
    together = ten_steps.posterior(output, x, steps)
    for i, step in enumerate(steps.tolist()):
        alone = ten_steps.posterior(output[i : i + 1], x[i : i + 1], step)
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[i])


def test_add_noise_then_true_noise_gives_x0_back():
    diffusion = create_diffusion(learn_sigma=False)
    x_0, noise = torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8)
    steps = torch.tensor([0, 10, 200, 500, 900])
    x_t = diffusion.add_noise(x_0, steps, noise)
    torch.testing.assert_close(diffusion.posterior(noise, x_t, steps).pred_x0, x_0, atol=2e-3, rtol=1e-3)


def test_variational_bound_is_the_kl_of_two_gaussians():
    diffusion = create_diffusion()
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(3, 1, 4, 4, generator=generator).clamp(-1, 1) for _ in range(2))
    steps = torch.tensor([400, 20, 999])
    x_t = diffusion.add_noise(x_0, steps, noise)
    output = torch.cat([noise + 0.1, torch.full_like(noise, 0.2)], dim=1)
    loss = diffusion.training_loss(output, x_0, x_t, noise, steps)
    for i, step in enumerate(steps.tolist()):
        posterior = diffusion.posterior(output[i : i + 1], x_t[i : i + 1], step)
        # q(x_{t-1} | x_t, x_0): the posterior of a model that predicts the noise exactly
        true = diffusion.posterior(
            torch.cat([noise, -torch.ones_like(noise)], 1)[i : i + 1], x_t[i : i + 1], step
        )
        kl = torch.distributions.kl_divergence(
            torch.distributions.Normal(true.mean, torch.exp(0.5 * true.log_variance)),
            torch.distributions.Normal(posterior.mean, torch.exp(0.5 * posterior.log_variance)),
        )
        assert loss[i].item() == pytest.approx(0.01 + kl.mean().item() / np.log(2), rel=2e-2)


def test_the_bound_trains_the_variance_and_not_the_noise():
    diffusion = create_diffusion()
    x_0, noise = torch.zeros(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    steps = torch.tensor([300, 0])
    output = torch.cat([noise, torch.zeros_like(noise)], dim=1).requires_grad_()
    diffusion.training_loss(
        output, x_0, diffusion.add_noise(x_0, steps, noise), noise, steps
    ).sum().backward()
    assert output.grad[:, 0].abs().max() == 0  # the noise is exact, so its squared error has no gradient
    assert (output.grad[:, 1].abs().amax(dim=(1, 2)) > 0).all()
