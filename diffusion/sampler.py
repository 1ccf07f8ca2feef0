"""The contract of a sampler: the mathematics of one denoising step, apart from models and caches.

A trajectory's state is a plain value: x_t, and what a multi-step solver keeps of earlier steps. It is copied
by assignment and differentiable, so trajectories may branch, be replayed and be trained through.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from diffusion.gaussian_diffusion import GaussianDiffusion


class State(NamedTuple):
    """Where a trajectory is: x_t (N, C, H, W), and tensors of any shape that a multi-step solver keeps."""

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


class ChainSampler:
    """Base of the samplers on a `GaussianDiffusion` chain: all of the contract but `step`.

    eta: the share of DDPM's noise that a sampler adds where it has a choice: 0 adds none. Raises ValueError
    outside [0, 1].
    """

    adds_noise = False

    def __init__(self, chain: GaussianDiffusion, eta: float = 0.0):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta} is outside [0, 1]; 0 adds no noise, 1 as much as DDPM")
        self.chain, self.eta = chain, eta

    @property
    def num_steps(self) -> int:
        return self.chain.num_timesteps

    def timestep(self, step: int) -> float:
        return self.chain.timestep_map[step]

    def start(self, x: Tensor) -> State:
        return State(x)

    def add_noise(self, x_0: Tensor, step: int, noise: Tensor) -> State:
        return State(self.chain.add_noise(x_0, step, noise))
