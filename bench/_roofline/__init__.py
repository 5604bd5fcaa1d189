"""Bytes and FLOPs of a training step, and the least time that they take."""
