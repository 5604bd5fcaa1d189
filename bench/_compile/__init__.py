"""Kernels compiled ahead of time, and what the compiler made of them."""
