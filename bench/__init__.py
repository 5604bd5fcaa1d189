"""Benchmarks: of a training step, of each op, and what both should cost."""
