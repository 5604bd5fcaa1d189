"""Attention forward: the Triton kernel, its launcher, and the cuDNN alternative.

See ``attention.py`` for the equations and ``attention_bwd.py`` for the backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from fastgpt.kernels import _host, configs
from fastgpt.kernels._attention import (
    Options,
    _document_bounds,
    _finite,
    _finite_or_zero,
    _first_keys,
    _head,
    _key_length,
    _load_tile,
    _lse_of,
    _past_gap,
    _store_tile,
    _visible,
    aligned,
    arguments,
    block_d,
    launch,
)
from fastgpt.kernels._device_math import dropout_keep, rounded_quotient


@triton.jit
def _softmax_step(
    scores, row_max, row_sum, offs_m, start_n,
    qk_scale, seed, dropout_offset, batch_head, threshold,
    APART: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return the probabilities (BLOCK_M, BLOCK_N) relative to the new maximum, the factor that
    rescales earlier sums to it, the new maximum and the new sum. The maximum is taken over the
    scores if APART, otherwise over the scores times qk_scale."""
    if APART:
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        probs = tl.exp2((scores - new_max[:, None]) * qk_scale)
        rescale = tl.exp2((row_max - new_max) * qk_scale)
    else:
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * qk_scale)
        probs = tl.exp2(scores * qk_scale - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(probs, axis=1)
    if DROPOUT:
        keep = dropout_keep(
            seed, dropout_offset, batch_head, start_n, offs_m, threshold, BLOCK_M, BLOCK_N
        )
        probs = tl.where(keep, probs, 0.0)
    return probs, rescale, new_max, row_sum


@triton.jit
def _attention_fwd_tiles(
    acc, row_max, row_sum,  # (BLOCK_M, BLOCK_D), (BLOCK_M), (BLOCK_M): the state of the softmax
    q, offs_m, first_m,
    k_ptr, k_stride_t, v_ptr, v_stride_t,
    lo, hi, gap_at, gap, n_keys, qk_scale, seed, dropout_offset, batch_head, threshold,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr,
    APART: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attend to keys lo .. hi. MASKED: the tiles cross the diagonal, the end of the keys or a
    document boundary; if PACKED, the unmasked tiles between them are skipped (``_past_gap``)."""
    for at in range(lo, hi, BLOCK_N):
        start_n = _past_gap(at, gap_at, gap, MASKED and PACKED)
        k = _load_tile(k_ptr, k_stride_t, start_n, n_keys, MASKED, HEAD, BLOCK_N, BLOCK_D)
        v = _load_tile(v_ptr, v_stride_t, start_n, n_keys, MASKED, HEAD, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if MASKED:
            # A non-finite value must affect exactly the rows that see it.
            all_finite = tl.min(_finite(v).to(tl.int32), axis=1)
            scores = tl.where((all_finite == 1)[None, :], scores, float("nan"))
            v = _finite_or_zero(v)
            visible = _visible(offs_m, first_m, start_n, n_keys, CAUSAL, PACKED, BLOCK_N)
            scores = tl.where(visible, scores, float("-inf"))
        probs, rescale, row_max, row_sum = _softmax_step(
            scores, row_max, row_sum, offs_m, start_n, qk_scale, seed, dropout_offset, batch_head,
            threshold, APART, DROPOUT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        acc = acc * rescale[:, None]
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc, row_max, row_sum


@triton.jit
def _attention_fwd_tiles_pipelined(
    acc, row_max, row_sum, q, offs_m,
    k_ptr, k_stride_t, v_ptr, v_stride_t,
    lo, hi, n_keys, qk_scale, seed, dropout_offset, batch_head, threshold,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``_attention_fwd_tiles`` for unmasked 16-bit tiles, at least one, with P V one tile behind to
    overlap with the next softmax (FlashAttention-3, Shah et al. 2024, arXiv:2407.08608, 3.2).

    The operand registers of a wgmma must not be written while it reads them. So the probabilities
    are carried in other registers, and copied after the wait by an operation that the compiler
    cannot remove: clearing the sign bit of non-negative numbers.
    """
    k = _load_tile(k_ptr, k_stride_t, lo, n_keys, False, HEAD, BLOCK_N, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    probs, rescale, row_max, row_sum = _softmax_step(
        scores, row_max, row_sum, offs_m, lo, qk_scale, seed, dropout_offset, batch_head,
        threshold, False, DROPOUT, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    # As integers: Triton passes a loop-carried dot operand through shared memory.
    pending = probs.to(q.dtype).to(tl.int16, bitcast=True)
    for start_n in range(lo + BLOCK_N, hi, BLOCK_N):
        k = _load_tile(k_ptr, k_stride_t, start_n, n_keys, False, HEAD, BLOCK_N, BLOCK_D)
        v = _load_tile(v_ptr, v_stride_t, start_n - BLOCK_N, n_keys, False, HEAD, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        acc = acc * rescale[:, None]  # waits for the previous P V
        pending = (pending & 0x7FFF).to(v.dtype, bitcast=True)
        acc = tl.dot(pending, v, acc, input_precision=PRECISION, out_dtype=ACC)
        probs, rescale, row_max, row_sum = _softmax_step(
            scores, row_max, row_sum, offs_m, start_n, qk_scale, seed, dropout_offset, batch_head,
            threshold, False, DROPOUT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        pending = probs.to(q.dtype).to(tl.int16, bitcast=True)
    v = _load_tile(v_ptr, v_stride_t, hi - BLOCK_N, n_keys, False, HEAD, BLOCK_N, BLOCK_D)
    acc = acc * rescale[:, None]
    pending = pending.to(v.dtype, bitcast=True)
    acc = tl.dot(pending, v, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc, row_max, row_sum


@triton.jit(
    do_not_specialize=["dropout_offset"],
    do_not_specialize_on_alignment=["seed_ptr", "key_lengths_ptr"],
)
def _attention_fwd_kernel(
    q_ptr, q_stride_b, q_stride_h, q_stride_t,  # (B, H, n_queries, HEAD), HEAD adjacent
    k_ptr, k_stride_b, k_stride_h, k_stride_t,  # (B, H / GROUP, n_keys, HEAD)
    v_ptr, v_stride_b, v_stride_h, v_stride_t,  # (B, H / GROUP, n_keys, HEAD)
    out_ptr,  # (B, n_queries, H, HEAD), contiguous
    lse_ptr,  # (B, H, 1, n_queries), contiguous; base 2. APART: (B, H, 2, n_queries)
    doc_start_ptr,  # (B, n_queries), contiguous; read only if PACKED
    key_lengths_ptr,  # (B), contiguous; read only if LENGTHS
    seed_ptr,  # (1), read only if DROPOUT
    dropout_offset,
    n_head, n_queries, n_keys, qk_scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, LENGTHS: tl.constexpr, GROUP: tl.constexpr,
    DROPOUT: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PIPELINED_PV: tl.constexpr = False,
):  # fmt: skip
    # A 1-D grid, since y and z are limited to 65,535 programs. The blocks of a head are adjacent so
    # that its keys stay in L2, and the longest rows of tiles start first.
    n_blocks = tl.cdiv(n_queries, BLOCK_M)
    batch_head = tl.program_id(0) // n_blocks
    start_m = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)

    q_ptr = _head(q_ptr, q_stride_b, q_stride_h, batch_head, n_head)
    k_ptr = _head(k_ptr, k_stride_b, k_stride_h, batch_head // GROUP, n_head // GROUP)
    v_ptr = _head(v_ptr, v_stride_b, v_stride_h, batch_head // GROUP, n_head // GROUP)
    q = _load_tile(q_ptr, q_stride_t, start_m, n_queries, True, HEAD, BLOCK_M, BLOCK_D)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    if LENGTHS:
        n_keys = _key_length(key_lengths_ptr, batch_head // n_head, n_keys)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    row_sum = tl.zeros([BLOCK_M], dtype=ACC)
    # Every query of the block sees the key tiles unmasked_lo .. unmasked_hi; those before (from lo)
    # and after (up to hi) are masked. If another loop follows a loop that leaves a wgmma in flight,
    # ptxas serialises every wgmma (C7515), so the unmasked loop comes last, under an `if`.
    # With documents, a query may see nothing of the first tile: row_max starts finite, because
    # -inf minus -inf would be NaN.
    row_max = tl.full([BLOCK_M], -3.4028234663852886e38 if PACKED else float("-inf"), dtype=ACC)
    if CAUSAL:
        unmasked_hi = tl.minimum(start_m, n_keys) // BLOCK_N * BLOCK_N
        hi = tl.minimum(start_m + BLOCK_M, n_keys)
    else:
        unmasked_hi = n_keys // BLOCK_N * BLOCK_N
        hi = n_keys
    lo, unmasked_lo, first_m = 0, 0, offs_m
    if PACKED:
        doc_start_ptr += (batch_head // n_head).to(tl.int64) * n_queries
        lo, unmasked_lo = _document_bounds(
            doc_start_ptr, start_m, n_queries, unmasked_hi, BLOCK_M, BLOCK_N
        )
        first_m = _first_keys(doc_start_ptr, offs_m, n_queries)
    gap = unmasked_hi - unmasked_lo
    acc, row_max, row_sum = _attention_fwd_tiles(
        acc, row_max, row_sum, q, offs_m, first_m, k_ptr, k_stride_t, v_ptr, v_stride_t,
        lo if PACKED else unmasked_hi, hi - gap if PACKED else hi, unmasked_lo, gap,
        n_keys, qk_scale, seed, dropout_offset, batch_head, threshold,
        True, CAUSAL, PACKED, DROPOUT, APART, PRECISION, ACC, HEAD, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if unmasked_hi > unmasked_lo:
        if PIPELINED_PV:
            acc, row_max, row_sum = _attention_fwd_tiles_pipelined(
                acc, row_max, row_sum, q, offs_m, k_ptr, k_stride_t, v_ptr, v_stride_t,
                unmasked_lo, unmasked_hi, n_keys, qk_scale, seed, dropout_offset, batch_head,
                threshold, DROPOUT, PRECISION, ACC, HEAD, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        else:
            acc, row_max, row_sum = _attention_fwd_tiles(
                acc, row_max, row_sum, q, offs_m, first_m, k_ptr, k_stride_t, v_ptr, v_stride_t,
                unmasked_lo, unmasked_hi, unmasked_hi, 0, n_keys, qk_scale, seed, dropout_offset,
                batch_head, threshold, False, CAUSAL, PACKED, DROPOUT, APART, PRECISION, ACC, HEAD,
                BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    if LENGTHS:
        row_sum = tl.where(n_keys > 0, row_sum, 1.0)  # 0 / 1, not 0 / 0
    # One division per row, rounded so that the probability of a single key is exactly 1.
    out = acc * rounded_quotient(tl.full([BLOCK_M], 1.0, ACC), row_sum)[:, None]
    if DROPOUT:
        out = out * keep_scale
    out_stride_t = n_head * HEAD
    out_ptr = _head(out_ptr, tl.cast(n_queries, tl.int64) * out_stride_t, HEAD, batch_head, n_head)
    # Rows are counted from 0: reusing q's mask would make the compiler keep it in registers.
    out_ptr += start_m.to(tl.int64) * out_stride_t
    _store_tile(out_ptr, out_stride_t, 0, n_queries - start_m, out, HEAD, BLOCK_M, BLOCK_D)
    lse_ptr = _lse_of(lse_ptr, batch_head, n_queries, APART) + offs_m
    mask_m = offs_m < n_queries
    if APART:
        tl.store(lse_ptr, row_max, mask=mask_m)
        tl.store(lse_ptr + n_queries, tl.log2(row_sum), mask=mask_m)
    else:
        tl.store(lse_ptr, row_max + tl.log2(row_sum), mask=mask_m)


# ------------------------------------------------------------------------------------- launchers


def empty_lse(x: Tensor, batch: int, n_head: int, n_queries: int) -> Tensor:
    """Allocate lse for q of x's dtype: one number per query, or two if APART."""
    numbers = 1 if _host.is_half(x.dtype) else 2
    return x.new_empty(batch, n_head, numbers, n_queries, dtype=_host.stats_dtype(x.dtype))


def _cudnn_can(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    """Whether PyTorch's cuDNN attention supports these inputs."""
    if not q.is_cuda or options.dropout_p or q.shape[1] != k.shape[1]:
        return False
    if options.doc_start is not None or options.key_lengths is not None:
        return False
    if options.causal and q.shape[2] != k.shape[2]:
        return False
    if any(0 in x.stride() for x in (q, k, v)):  # expanded: an error before PyTorch #175764
        return False
    asked = SDPAParams(q, k, v, None, 0.0, options.causal, False)
    return can_use_cudnn_attention(asked)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, options.causal, False, scale=options.scale
    )
    # cuDNN's lse is in base e, of shape (B, H, Tq) or (B, H, Tq, 1).
    return out.transpose(1, 2).contiguous(), (lse * _host.LOG2_E).view(*q.shape[:2], 1, -1)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """O (B, Tq, H, D), contiguous, and lse (B, H, 1 or 2, Tq)."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    batch, n_head, n_queries, head_size = q.shape
    if configs.find(q, "attention", "fwd_library", block_d(head_size)) == configs.CUDNN:
        if q.numel() and k.numel() and _cudnn_can(q, k, v, options):
            return _cudnn(q, k, v, options)
    out = torch.empty(batch, n_queries, n_head, head_size, dtype=q.dtype, device=q.device)
    lse = empty_lse(q, batch, n_head, n_queries)
    if out.numel():
        shared = arguments(q, k, v, options)
        config = launch("fwd", q, shared)
        grid = (_host.cdiv(n_queries, config["BLOCK_M"]) * batch * n_head,)
        with _host.on_device(q):
            _attention_fwd_kernel[grid](out_ptr=out, lse_ptr=lse, **shared, **config)
    return out, lse
