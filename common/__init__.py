"""Parts that know nothing about diffusion: command lines, files, processes, timing, pictures, registries."""
