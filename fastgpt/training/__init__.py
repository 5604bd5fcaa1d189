"""Training: configuration, the loop and its update, devices and ranks, checkpoints."""
