"""What knows nothing of diffusion: command lines, files, processes, timing, pictures, the examples' names."""
