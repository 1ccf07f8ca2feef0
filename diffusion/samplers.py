"""Samplers by name. A new solver is one file with a class like `diffusion.sampler.Sampler`, and one row."""

from collections.abc import Callable

from diffusion.ddim import DDIM
from diffusion.ddpm import DDPM
from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.sampler import Sampler

# The value of --sampler: what makes the sampler of a chain and an eta.
SAMPLERS: dict[str, Callable[[GaussianDiffusion, float], Sampler]] = {
    "ddim": DDIM,
    "ddpm": DDPM,
}


def create_sampler(name: str, chain: GaussianDiffusion, eta: float = 0.0) -> Sampler:
    """The sampler of this name on a chain. Raises ValueError for another name, or an eta outside [0, 1]."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name](chain, eta)


def as_sampler(diffusion: GaussianDiffusion | Sampler) -> Sampler:
    """A sampler as it is; for a chain, deterministic DDIM on it."""
    return DDIM(diffusion) if isinstance(diffusion, GaussianDiffusion) else diffusion
