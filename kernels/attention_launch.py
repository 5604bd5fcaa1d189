"""The host functions of attention: what the kernels are launched with, and what that costs.

The kernels stand in ``attention_kernels.py`` and ``attention_backward_kernels.py``, the launch
tables in ``attention_tiles.py``.
"""

import torch
import triton
from torch import Tensor

from fastgpt.kernels import _host
from fastgpt.kernels.attention_bwd import (
    _attention_bwd_dkdv_kernel,
    _attention_bwd_dq_kernel,
)
from fastgpt.kernels.attention_fwd import _attention_fwd_kernel
from fastgpt.kernels.attention_tiles import launch
from fastgpt.kernels.costs import KernelCost, attention_pairs, nbytes


def empty_lse(x: Tensor, batch: int, n_head: int, n_queries: int) -> Tensor:
    """What a forward with q of x's dtype saves for each query: one number, or two APART."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(batch, n_head, 1 if _host.is_half(x.dtype) else 2, n_queries, dtype=dtype)


def _aligned(x: Tensor) -> Tensor:
    """x (B, H, T, D), D a multiple of 16, so that every row begins at a multiple of 16 elements.
    Where its strides do not, one copy is less work than loads of single elements for every tile,
    whose addresses also take the registers."""
    strides = x.stride()
    if strides[3] == 1 and x.data_ptr() % 16 == 0 and not any(s % 16 for s in strides[:3]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _settings(
    kernel: str, q: Tensor, starts: Tensor | None, causal: bool, dropout_p: float
) -> tuple[dict[str, float], dict]:
    """What every kernel takes beside its tensors: the dropout's numbers, and the constexprs."""
    threshold, keep_scale = _host.dropout_numbers(dropout_p)
    numbers = dict(threshold=threshold, keep_scale=keep_scale)
    constexprs = dict(
        CAUSAL=causal,
        PACKED=starts is not None,
        DROPOUT=threshold > 0,
        APART=not _host.is_half(q.dtype),
        PRECISION=_host.dot_precision(q.dtype),
        ACC=_host.accumulator(q.dtype),
        HEAD=q.shape[3],
        **launch(kernel, q.device, q.shape[3], q.dtype, threshold > 0, starts is not None),
        **_host.FMA,
    )
    return numbers, constexprs


def _rows(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.contiguous()


def _ends(starts: Tensor) -> Tensor:
    """(B, T) of int32: where the queries end that see each key."""
    keys = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
    return torch.searchsorted(starts, keys.repeat(len(starts), 1), right=True, out_int32=True)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    starts: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """O (B, Tq, H, D), contiguous, and lse (B, H, 1 or 2, Tq)."""
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    batch, n_head, n_queries, head_size = q.shape
    out = torch.empty(batch, n_queries, n_head, head_size, dtype=q.dtype, device=q.device)
    lse = empty_lse(q, batch, n_head, n_queries)
    if out.numel():
        numbers, constexprs = _settings("fwd", q, starts, causal, dropout_p)
        blocks = triton.cdiv(n_queries, constexprs["BLOCK_M"])
        with _host.on_device(q):
            _attention_fwd_kernel[(blocks * batch * n_head,)](
                q,
                *q.stride()[:3],
                k,
                *k.stride()[:3],
                v,
                *v.stride()[:3],
                out,
                lse,
                _rows(starts),
                seed,
                stream,
                n_head,
                n_queries,
                k.shape[2],
                qk_scale=scale * _host.LOG2_E,
                **numbers,
                **constexprs,
            )
    return out, lse


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    seed: Tensor | None,
    starts: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    stream: int,
) -> None:
    """Writes dq, dk, dv: (B, T, H, D), contiguous but for the distance between two tokens."""
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    batch, n_head, n_queries, _ = q.shape
    n_keys = k.shape[2]
    dout, starts = dout.contiguous(), _rows(starts)
    delta = torch.empty_like(lse[:, :, 0])
    scales = dict(qk_scale=scale * _host.LOG2_E, scale=scale)
    inputs = (q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3])
    with _host.on_device(q):
        if dq.numel():
            numbers, constexprs = _settings("dq", q, starts, causal, dropout_p)
            blocks = triton.cdiv(n_queries, constexprs["BLOCK_M"])
            _attention_bwd_dq_kernel[(blocks * batch * n_head,)](
                *inputs,
                out,
                dout,
                lse,
                delta,
                dq,
                dq.stride(1),
                starts,
                seed,
                stream,
                n_head,
                n_queries,
                n_keys,
                **scales,
                **numbers,
                **constexprs,
            )
        if dk.numel():
            numbers, constexprs = _settings("dkdv", q, starts, causal, dropout_p)
            blocks = triton.cdiv(n_keys, constexprs["BLOCK_N"])
            _attention_bwd_dkdv_kernel[(blocks * batch * n_head,)](
                *inputs,
                dout,
                lse,
                delta,
                dk,
                dv,
                dk.stride(1),
                starts,
                None if starts is None else _ends(starts),
                seed,
                stream,
                n_head,
                n_queries,
                n_keys,
                **scales,
                **numbers,
                **constexprs,
            )


def fwd_cost(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> KernelCost:
    """q, k, v as (B, H, T, D). Two products a tile. Documents make it less; how much, the values of
    starts would tell, but a formula reads none."""
    return KernelCost("fwd", 2 * _product(q, k, causal), nbytes(q, k, v, out, lse))


def bwd_cost(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> list[KernelCost]:
    """Three products a tile, then four: each kernel computes the scores and dP for itself."""
    product = _product(q, k, causal)
    dq, dk, dv, dout, delta = q, k, v, out, lse[:, :, 0]  # of the same sizes
    return [
        KernelCost("dq", 3 * product, nbytes(q, k, v, out, dout, lse, delta, dq)),
        KernelCost("dkdv", 4 * product, nbytes(q, k, v, dout, lse, delta, dk, dv)),
    ]


def _product(q: Tensor, k: Tensor, causal: bool) -> int:
    batch, n_head, n_queries, head_size = q.shape
    return 2 * batch * n_head * attention_pairs(n_queries, k.shape[2], causal) * head_size
