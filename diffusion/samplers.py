"""Samplers: the mathematics of one denoising step, apart from models and caches.

A trajectory's state is a plain value: x_t, and what a multi-step solver keeps of earlier steps. It is copied
by assignment and differentiable, so trajectories may branch, be replayed and be trained through. A new solver
is a class with the members of `Sampler` and a row in `SAMPLERS`.

| name | step | adds noise |
|---|---|---|
| `ddim` | Song et al. 2021, eq. 12, with `eta` | where eta > 0 |
| `ddpm` | Ho et al. 2020, ancestral, with the learned variance | yes |
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from diffusion.gaussian_diffusion import GaussianDiffusion


class State(NamedTuple):
    """Where a trajectory is: x_t (N, C, H, W), and what a multi-step solver keeps, tensors of any shape."""

    x: Tensor
    history: tuple[Tensor, ...] = ()

    def detach(self) -> "State":
        return State(self.x.detach(), tuple(one.detach() for one in self.history))


class Sampler(Protocol):
    """What every loop over denoising steps asks of a solver. Steps run from num_steps - 1 down to 0."""

    @property
    def num_steps(self) -> int: ...

    @property
    def adds_noise(self) -> bool:
        """Whether `step` needs fresh noise of x's shape."""

    def timestep(self, step: int) -> float:
        """The timestep that the model receives at `step`."""

    def start(self, x: Tensor) -> State:
        """The state before the first step, from pure noise x (N, C, H, W)."""

    def add_noise(self, x_0: Tensor, step: int, noise: Tensor) -> State:
        """The state at `step` of a trajectory that ends in x_0 (N, C, H, W), as training on data needs it."""

    def step(self, output: Tensor, state: State, step: int, noise: Tensor | None = None) -> State:
        """The state after `step`, from the model's output (N, C or 2C, H, W) at state.x."""


class _ChainSampler:
    """What samplers of a `GaussianDiffusion` chain share; they keep no history."""

    def __init__(self, chain: GaussianDiffusion):
        self.chain = chain

    @property
    def num_steps(self) -> int:
        return self.chain.num_timesteps

    def timestep(self, step: int) -> float:
        return self.chain.timestep_map[step]

    def start(self, x: Tensor) -> State:
        return State(x)

    def add_noise(self, x_0: Tensor, step: int, noise: Tensor) -> State:
        return State(self.chain.add_noise(x_0, step, noise))


class DDIM(_ChainSampler):
    """eta 0 is deterministic, eta 1 as noisy as DDPM. Raises ValueError for an eta outside [0, 1]."""

    def __init__(self, chain: GaussianDiffusion, eta: float = 0.0):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta} is outside [0, 1]; 0 is DDIM, 1 as noisy as DDPM")
        super().__init__(chain)
        self.eta = eta

    @property
    def adds_noise(self) -> bool:
        return self.eta > 0

    def step(self, output: Tensor, state: State, step: int, noise: Tensor | None = None) -> State:
        return State(self.chain.ddim_step(output, state.x, step, self.eta, noise))


class DDPM(_ChainSampler):
    """Ancestral sampling; eta has no meaning here."""

    adds_noise = True

    def step(self, output: Tensor, state: State, step: int, noise: Tensor | None = None) -> State:
        return State(self.chain.ddpm_step(output, state.x, step, noise))


SAMPLERS = {"ddim": DDIM, "ddpm": DDPM}


def create_sampler(name: str, chain: GaussianDiffusion, eta: float = 0.0) -> Sampler:
    """The sampler of this name on a chain. Raises ValueError for another name, or an eta outside [0, 1]."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    ddim = DDIM(chain, eta)  # whose eta is checked, whichever is taken
    return ddim if name == "ddim" else SAMPLERS[name](chain)


def as_sampler(diffusion: "GaussianDiffusion | Sampler") -> Sampler:
    """A sampler as it is; for a chain, deterministic DDIM on it."""
    return DDIM(diffusion) if isinstance(diffusion, GaussianDiffusion) else diffusion
