"""Training a router: rounds, the run and its checkpoints, the target speed, data, logs, flags."""
