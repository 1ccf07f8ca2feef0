"""DDPM: ancestral sampling, Ho et al. 2020, with the learned variance where the model predicts one."""

from torch import Tensor

from diffusion.sampler import ChainSampler, State


class DDPM(ChainSampler):
    """It always adds all of its noise: eta changes nothing."""

    adds_noise = True

    def step(self, output: Tensor, state: State, step: int, noise: Tensor | None = None) -> State:
        return State(self.chain.ddpm_step(output, state.x, step, noise))
