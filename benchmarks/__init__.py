"""What sampling and training cost; `benchmarks/results/` holds measurements, named after their hardware."""
