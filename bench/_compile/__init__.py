"""Ahead-of-time compilation of the kernels, and analysis of the compiled code."""
