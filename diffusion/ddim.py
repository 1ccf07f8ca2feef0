"""DDIM: Song et al. 2021, eq. 12. Deterministic at eta 0; at eta 1 as noisy as DDPM."""

from torch import Tensor

from diffusion.sampler import ChainSampler, State


class DDIM(ChainSampler):
    @property
    def adds_noise(self) -> bool:
        return self.eta > 0

    def step(self, output: Tensor, state: State, step: int, noise: Tensor | None = None) -> State:
        return State(self.chain.ddim_step(output, state.x, step, self.eta, noise))
