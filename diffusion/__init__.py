"""Gaussian diffusion: the linear schedule, respacing, samplers, and the training loss of DiT."""

from diffusion.ddim import DDIM
from diffusion.ddpm import DDPM
from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.respace import space_timesteps
from diffusion.sampler import ChainSampler, Sampler, State, WithNoise
from diffusion.samplers import SAMPLERS, as_sampler, create_sampler
from diffusion.solvers import FlowEuler

__all__ = [
    "DDIM",
    "DDPM",
    "NUM_TIMESTEPS",
    "ChainSampler",
    "FlowEuler",
    "SAMPLERS",
    "GaussianDiffusion",
    "Sampler",
    "State",
    "WithNoise",
    "as_sampler",
    "create_diffusion",
    "create_sampler",
    "space_timesteps",
]

NUM_TIMESTEPS = 1000  # length of the chain that the models were trained on


def create_diffusion(
    timestep_respacing: str | int = "", diffusion_steps: int = NUM_TIMESTEPS, learn_sigma: bool = True
) -> GaussianDiffusion:
    """A linear-beta chain of `diffusion_steps`, shortened to the steps that `timestep_respacing` keeps.

    timestep_respacing: `"10"` (ten, first and last kept), `"ddim50"` (fixed stride, DDIM's spacing),
    `"10,15,20"` (that many from each third), or `""` for all. Raises ValueError where the chain cannot be
    divided so.
    """
    return GaussianDiffusion(
        diffusion_steps, space_timesteps(diffusion_steps, timestep_respacing), learn_sigma
    )
