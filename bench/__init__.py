"""Benchmarks of a training step and of each op, and predictions of their cost."""
