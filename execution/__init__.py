"""The same numbers, faster: compiled branches, CUDA graphs, quantised weights, kernels."""
