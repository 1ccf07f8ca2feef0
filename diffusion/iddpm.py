"""IDDPM as PixArt samples with it: DDPM with the learned variance, guided in three channels (Nichol 2021)."""

from diffusion.ddpm import DDPM


class IDDPM(DDPM):
    guided_channels = 3
