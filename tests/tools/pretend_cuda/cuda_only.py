"""CPU implementations of operators that PyTorch has only on CUDA, or with other arguments there."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.tools.pretend_cuda.device import CAPABILITY

aten = torch.ops.aten

_HALF = (torch.float16, torch.bfloat16)


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    if a.dtype != b.dtype or not (out_dtype == a.dtype or out_dtype == torch.float32):
        raise RuntimeError(f"mm: no product of {a.dtype} and {b.dtype} in {out_dtype}")
    wide = torch.float32 if a.dtype in _HALF else a.dtype
    return (a.to(wide) @ b.to(wide)).to(out_dtype)


def _addmm(
    c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, beta: float = 1, alpha: float = 1
) -> Tensor:
    if c.dtype not in (out_dtype, a.dtype):
        raise RuntimeError(f"addmm: self must be {out_dtype} or {a.dtype}, got {c.dtype}")
    return (c * beta + alpha * _mm(a, b, out_dtype)).to(out_dtype)


def _addmm_out(
    c: Tensor,
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    beta: float = 1,
    alpha: float = 1,
    *,
    out: Tensor,
) -> Tensor:
    if out.dtype != out_dtype:
        raise RuntimeError(f"addmm: out must be {out_dtype}, got {out.dtype}")
    return out.copy_(_addmm(c, a, b, out_dtype, beta, alpha))


def _widened(softmax: Any) -> Callable[..., Tensor]:
    """half_to_float: CUDA converts float16 and bfloat16 to float32 in the same kernel."""

    def widened(x: Tensor, dim: int, half_to_float: bool, **out: Tensor) -> Tensor:
        y: Tensor = softmax(x.float() if half_to_float else x, dim, False, **out)
        return y

    return widened


def _scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Sequence[Tensor],
    recipe_a: Sequence[int],
    swizzle_a: Sequence[int],
    scale_b: Sequence[Tensor],
    recipe_b: Sequence[int],
    swizzle_b: Sequence[int],
    bias: Tensor | None,
    out_dtype: torch.dtype,
    contraction_dim: Sequence[int] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    """One scale per matrix; rejects what cuBLASLt and PyTorch's check reject."""
    k, n = b.shape
    wrong = [
        text
        for text, met in {
            "compute capability 8.9 or above": CAPABILITY >= 89,
            "one scale a matrix": list(recipe_a) == list(recipe_b) == [0],
            "mat1 in rows": a.stride(1) == 1 and a.stride(0) >= k,
            "mat2 in columns": b.stride(0) == 1 and b.stride(1) >= k,
            "columns that are multiples of 16": k % 16 == n % 16 == 0,
            "strides that are multiples of 16": a.stride(0) % 16 == b.stride(1) % 16 == 0,
            "addresses that are multiples of 16": a.data_ptr() % 16 == b.data_ptr() % 16 == 0,
            "not e5m2 twice": not (a.dtype == b.dtype == torch.float8_e5m2),
            "a half-precision bias": bias is None or bias.dtype == out_dtype in _HALF,
        }.items()
        if not met
    ]
    if wrong:
        raise RuntimeError(f"_scaled_mm of {tuple(a.shape)} and {tuple(b.shape)} needs {wrong}")
    y = (a.float() @ b.float()) * (scale_a[0] * scale_b[0])
    return (y if bias is None else y + bias.float()).to(out_dtype)


def _tight(product: Any) -> Callable[..., Tensor]:
    """Copies matrices without padding: with AMX, oneDNN multiplies the padding of rows with an odd
    number of bfloat16 columns by 0, which propagates NaN."""

    def tight(*args: Any, **kwargs: Any) -> Tensor:
        tight_args = (x.contiguous() if isinstance(x, Tensor) else x for x in args)
        y: Tensor = product(*tight_args, **kwargs)
        return y

    return tight


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "aten::mm": _tight(aten.mm.default),
    "aten::mm.out": _tight(aten.mm.out),
    "aten::bmm": _tight(aten.bmm.default),
    "aten::bmm.out": _tight(aten.bmm.out),
    "aten::addmm": _tight(aten.addmm.default),
    "aten::addmm.out": _tight(aten.addmm.out),
    "aten::mm.dtype": _mm,
    "aten::addmm.dtype": _addmm,
    "aten::addmm.dtype_out": _addmm_out,
    "aten::_softmax": _widened(aten._softmax.default),
    "aten::_log_softmax": _widened(aten._log_softmax.default),
    "aten::_softmax.out": _widened(aten._softmax.out),
    "aten::_log_softmax.out": _widened(aten._log_softmax.out),
    "aten::_scaled_mm_v2": _scaled_mm,
}


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Uses the math implementation instead of choosing a fused kernel like a GPU."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zeros = torch.zeros_like(attn_mask, dtype=q.dtype)
        attn_mask = zeros.masked_fill(~attn_mask, float("-inf"))
    options = {"scale": scale, "enable_gqa": enable_gqa}
    out: Tensor = aten._scaled_dot_product_attention_math(
        q, k, v, attn_mask, dropout_p, is_causal, None, **options
    )[0]
    return out
