"""What things cost; `benchmarks/results/` holds what was measured on which hardware."""
