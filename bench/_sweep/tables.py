"""The lines of the launch tables that ``sweep.py`` tries to improve, by op."""

from collections.abc import Callable, Iterator

import torch

from bench._sweep.line import Line
from bench._sweep.products import attention_lines, gemm_lines
from bench._sweep.rows import (
    adamw_lines,
    cross_entropy_lines,
    embedding_lines,
    gelu_lines,
    layer_norm_lines,
)

OPS: dict[str, Callable[[int | None, torch.dtype], Iterator[Line]]] = {
    "attention": attention_lines,
    "gemm": gemm_lines,
    "layer_norm": layer_norm_lines,
    "cross_entropy": cross_entropy_lines,
    "gelu": gelu_lines,
    "embedding": embedding_lines,
    "adamw": adamw_lines,
}


def lines(op: str, capability: int | None, dtype: torch.dtype) -> dict[str, Line]:
    """Name → line. ``capability``: 80, 90, 100, ...; None for the interpreter's tables."""
    return {line.name: line for line in OPS[op](capability, dtype)}
