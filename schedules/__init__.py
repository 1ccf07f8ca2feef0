"""Schedules without gradients: baselines, calibrated reuse, and the values of `--accelerate-method`."""
