"""Tensor helpers shared by all implementations of an op: compute dtypes, views as matrices and as
heads. Needs only torch."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype if it is enabled on x's device, otherwise x's own."""
    device_type = x.device.type
    # meta has no autocast, and asking PyTorch 2.11 about it is a graph break under torch.compile.
    if x.dtype == torch.float64 or device_type == "meta":
        return x.dtype
    enabled = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else x.dtype


def matmul_float32(a: Tensor, b: Tensor, accumulate_into: Tensor | None = None) -> Tensor:
    """``a @ b`` for matrices of one dtype, summed and returned in float32 (float64 for float64).

    With ``accumulate_into``, of the result's shape and dtype, the product is added to it in place
    and it is returned. Only ``out=`` variants are called, which autocast does not affect.
    """
    half = a.dtype in (torch.float16, torch.bfloat16)
    # cuBLAS accumulates in float32 and can store that. Not used with hipBLAS, which is untested,
    # nor for empty matrices, whose sums need no precision.
    if half and a.is_cuda and torch.version.hip is None and a.numel() and b.numel():
        if accumulate_into is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(accumulate_into, a, b, out_dtype=torch.float32, out=accumulate_into)
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    if accumulate_into is None:
        return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
    return torch.addmm(accumulate_into, a, b, out=accumulate_into)


def row_count(x: Tensor) -> int:
    """The number of rows of ``as_matrix(x)``."""
    return math.prod(x.shape[:-1])


def as_matrix(x: Tensor) -> Tensor:
    """(..., N) → (M, N), a view if possible. ``reshape(-1, N)`` would fail for N = 0."""
    return x.reshape(row_count(x), x.shape[-1])


def attention_scale(scale: float | None, head_size: int) -> float:
    return 1.0 / math.sqrt(head_size) if scale is None else scale


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3C) → three views (B, H, T, D) with C = H * D, without a copy."""
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, n_head, width // (3 * n_head)).permute(2, 0, 3, 1, 4)
    return q, k, v


_OPTIONS = "causal", "scale", "dropout_p", "seed", "dropout_offset", "doc_start"


def unpacked(attention: Callable[..., Tensor], qkv: Tensor, n_head: int, *options: Any) -> Tensor:
    """``attention_qkvpacked`` by an ``attention`` with separate q, k and v; ``options``: those of
    ``_OPTIONS``, in order."""
    y = attention(*split_heads(qkv, n_head), **dict(zip(_OPTIONS, options, strict=True)))
    return y.transpose(1, 2).flatten(2).contiguous()  # (B, T, C)
