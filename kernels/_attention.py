"""Helpers shared by the forward and backward of attention: device functions, options and launch
arguments. See ``attention.py`` for the equations.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _host, configs


@triton.jit
def _head(ptr, stride_b, stride_h, batch_head, n_head):
    """Pointer to head ``batch_head`` = b * n_head + h of a (B, H, T, D) tensor."""
    batch, head = (batch_head // n_head).to(tl.int64), (batch_head % n_head).to(tl.int64)
    return ptr + batch * stride_b + head * stride_h


@triton.jit
def _tile_ptrs(
    ptr, stride_t, start, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Pointers to rows start .. start + BLOCK_T. Only the tile's own offset needs 64 bits; offsets
    within the tile fit in 32."""
    offs_t, offs_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    tile_ptr = ptr + tl.cast(start, tl.int64) * stride_t
    return tile_ptr + offs_t[:, None] * stride_t + offs_d[None, :]


@triton.jit
def _tile_mask(
    start, n_rows, HEAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Which of a tile's elements exist: row < n_rows and column < HEAD."""
    rows = start + tl.arange(0, BLOCK_T) < n_rows
    return rows[:, None] & (tl.arange(0, BLOCK_D) < HEAD)[None, :]


@triton.jit
def _load_tile(
    ptr, stride_t, start, n_rows,
    MASKED: tl.constexpr, HEAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A (BLOCK_T, BLOCK_D) tile of (n_rows, HEAD), 0 outside. If not MASKED, all its rows exist."""
    ptrs = _tile_ptrs(ptr, stride_t, start, BLOCK_T, BLOCK_D)
    if MASKED:
        tile = tl.load(ptrs, mask=_tile_mask(start, n_rows, HEAD, BLOCK_T, BLOCK_D), other=0.0)
    elif HEAD == BLOCK_D:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=(tl.arange(0, BLOCK_D) < HEAD)[None, :], other=0.0)
    return tile


@triton.jit
def _store_tile(
    ptr, stride_t, start, n_rows, tile, HEAD: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    ptrs = _tile_ptrs(ptr, stride_t, start, BLOCK_T, BLOCK_D)
    mask = _tile_mask(start, n_rows, HEAD, BLOCK_T, BLOCK_D)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lse_of(lse_ptr, batch_head, n_queries, APART: tl.constexpr):
    """Pointer to the lse of head ``batch_head``."""
    return lse_ptr + batch_head.to(tl.int64) * n_queries * (2 if APART else 1)


@triton.jit
def _load_lse(lse_ptr, offs_m, n_queries, APART: tl.constexpr):
    """lse of these queries of a head: its two parts if APART, otherwise the second is unused."""
    mask = offs_m < n_queries
    lse = tl.load(lse_ptr + offs_m, mask=mask, other=0.0)
    log_sum = tl.load(lse_ptr + n_queries + offs_m, mask=mask, other=0.0) if APART else lse
    return lse, log_sum


@triton.jit
def _probabilities(scores, lse, log_sum, qk_scale, APART: tl.constexpr):
    """P from the scores and the results of ``_load_lse``, broadcast to their shape."""
    if APART:
        exponent = (scores - lse) * qk_scale - log_sum
    else:
        exponent = scores * qk_scale - lse
    return tl.exp2(exponent)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _finite_or_zero(x):
    """For masked keys and values: their probability is 0, but 0 * NaN is NaN."""
    return tl.where(_finite(x), x, 0.0)


@triton.jit
def _visible(
    offs_m, first_m, start_n, n_keys,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(M, BLOCK_N) mask: query i sees key j if j exists, j <= i if CAUSAL, and j >= first_m of i if
    PACKED. Compared relative to start_n, so that comparisons are of 32 bits."""
    last = tl.zeros_like(offs_m) + (n_keys - 1)
    if CAUSAL:
        last = tl.minimum(last, offs_m)
    visible = (last - start_n)[:, None] >= tl.arange(0, BLOCK_N)[None, :]
    if PACKED:
        visible = visible & ((first_m - start_n)[:, None] <= tl.arange(0, BLOCK_N)[None, :])
    return visible


@triton.jit
def _key_length(key_lengths_ptr, batch, n_keys):
    """The number of valid keys of this sequence, clamped to [0, n_keys]."""
    return tl.minimum(tl.maximum(tl.load(key_lengths_ptr + batch), 0), n_keys)


@triton.jit
def _first_keys(doc_start_ptr, rows, length):
    """doc_start of these rows, clamped to [0, row], so that every query sees itself."""
    first = tl.load(doc_start_ptr + rows, mask=rows < length, other=0)
    return tl.maximum(tl.minimum(first, rows), 0)


@triton.jit
def _past_gap(at, gap_at, gap, SKIPS: tl.constexpr):
    """The tile's position for loop index ``at``: from gap_at on, ``gap`` keys are skipped."""
    if SKIPS:
        at += tl.where(at < gap_at, 0, gap)
    return at


@triton.jit
def _document_bounds(
    doc_start_ptr, start_m, n_queries, unmasked_hi, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """(lo, unmasked_lo), both at most unmasked_hi: the first key tile that any query of the block
    sees, and the first that all of them see completely."""
    first = _first_keys(doc_start_ptr, start_m, n_queries)
    last = _first_keys(doc_start_ptr, tl.minimum(start_m + BLOCK_M, n_queries) - 1, n_queries)
    return (
        tl.minimum(first // BLOCK_N * BLOCK_N, unmasked_hi),
        tl.minimum(tl.cdiv(last, BLOCK_N) * BLOCK_N, unmasked_hi),
    )


# ----------------------------------------------------------------------------------- host helpers


class Options(NamedTuple):
    """The arguments of both passes besides q, k and v. See ``attention``."""

    seed: Tensor | None
    doc_start: Tensor | None
    causal: bool
    scale: float
    dropout_p: float
    dropout_offset: int
    key_lengths: Tensor | None = None


MAX_HEAD_SIZE = 256


def check_head_size(name: str, head_size: int) -> None:
    if head_size > MAX_HEAD_SIZE:
        raise ValueError(
            f"{name} must have a head size of at most {MAX_HEAD_SIZE}, got {head_size}"
        )


def block_d(head_size: int) -> int:
    """The width of a head's tile."""
    return max(16, _host.next_power_of_2(head_size))


def aligned(x: Tensor) -> Tensor:
    """x (B, H, T, D), D a multiple of 16, with rows aligned to 16 elements. Copied if its strides
    are not, which costs less than loading every tile element by element."""
    strides = x.stride()
    if strides[3] == 1 and x.data_ptr() % 16 == 0 and not any(s % 16 for s in strides[:3]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


_STRIDES = [f"{name}_stride_{dim}" for name in "qkv" for dim in "bht"]


def arguments(q: Tensor, k: Tensor, v: Tensor, options: Options) -> dict[str, Any]:
    """The arguments common to all attention kernels, without ``launch``'s and their own tensors."""
    seed, doc_start, causal, scale, dropout_p, dropout_offset, key_lengths = options
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    return dict(
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        **dict(zip(_STRIDES, strides, strict=True)),
        doc_start_ptr=None if doc_start is None else doc_start.contiguous(),
        key_lengths_ptr=None if key_lengths is None else key_lengths.contiguous(),
        seed_ptr=seed,
        dropout_offset=dropout_offset,
        n_head=q.shape[1],
        n_queries=q.shape[2],
        n_keys=k.shape[2],
        qk_scale=scale * _host.LOG2_E,
        **_host.dropout_arguments(dropout_p),
        CAUSAL=causal,
        PACKED=doc_start is not None,
        LENGTHS=key_lengths is not None,
        GROUP=q.shape[1] // max(1, k.shape[1]),
        APART=not _host.is_half(q.dtype),
        PRECISION=_host.dot_precision(q.dtype),
        ACC=_host.accumulator(q.dtype),
        HEAD=q.shape[3],
        BLOCK_D=block_d(q.shape[3]),
    )


def launch(kernel: str, q: Tensor, shared: dict[str, Any]) -> dict[str, Any]:
    """The launch configuration of a kernel; ``shared``: its ``arguments``."""
    capability = _host.capability(q.device)
    if capability is not None and capability < 80:
        raise ValueError(
            "attention by Triton needs compute capability 8.0, got "
            f"{capability // 10}.{capability % 10} on {q.device}: fastgpt.ops uses PyTorch's there"
        )
    given = dict(dropout="DROPOUT", documents="PACKED", lengths="LENGTHS")
    names = (name for name, constant in given.items() if shared[constant])
    return configs.launch(configs.find(q, "attention", kernel, shared["BLOCK_D"], *names))
