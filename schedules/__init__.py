"""Schedules without a training: baselines, calibrated reuse, and what `--accelerate-method` names."""
