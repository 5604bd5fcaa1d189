"""Attention backward: a kernel that owns queries (dQ and delta), a kernel that owns keys (dK, dV),
and their launcher. See ``attention.py`` for the equations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _host
from fastgpt.kernels._attention import (
    Options,
    _document_bounds,
    _finite_or_zero,
    _first_keys,
    _head,
    _key_length,
    _load_lse,
    _load_tile,
    _lse_of,
    _past_gap,
    _probabilities,
    _store_tile,
    _visible,
    aligned,
    arguments,
    launch,
)
from fastgpt.kernels._device_math import dropout_keep


@triton.jit
def _attention_dq_tiles(
    dq, q, dout, lse, log_sum, delta, offs_m, n_queries, doc_start_ptr,
    k_ptr, k_stride_t, v_ptr, v_stride_t,
    lo, hi, gap_at, gap, n_keys, qk_scale, seed, dropout_offset, batch_head, threshold, keep_scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr,
    APART: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Accumulate the contribution of keys lo .. hi to dq / scale."""
    for at in range(lo, hi, BLOCK_N):
        start_n = _past_gap(at, gap_at, gap, MASKED and PACKED)
        k = _load_tile(k_ptr, k_stride_t, start_n, n_keys, MASKED, HEAD, BLOCK_N, BLOCK_D)
        v = _load_tile(v_ptr, v_stride_t, start_n, n_keys, MASKED, HEAD, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        probs = _probabilities(scores, lse[:, None], log_sum[:, None], qk_scale, APART)
        dprobs = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        if DROPOUT:
            keep = dropout_keep(
                seed, dropout_offset, batch_head, start_n, offs_m, threshold, BLOCK_M, BLOCK_N
            )
            dprobs = tl.where(keep, dprobs * keep_scale, 0.0)
        dscores = probs * (dprobs - delta[:, None])
        if MASKED:
            first_m = offs_m
            if PACKED:  # loaded here so that only masked tiles spend registers on it
                first_m = _first_keys(doc_start_ptr, offs_m, n_queries)
            visible = _visible(offs_m, first_m, start_n, n_keys, CAUSAL, PACKED, BLOCK_N)
            dscores = tl.where(visible, dscores, 0.0)
            k = _finite_or_zero(k)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
    return dq


@triton.jit(
    do_not_specialize=["dropout_offset"],
    do_not_specialize_on_alignment=["seed_ptr", "key_lengths_ptr"],
)
def _attention_bwd_dq_kernel(
    q_ptr, q_stride_b, q_stride_h, q_stride_t,  # (B, H, n_queries, HEAD), HEAD adjacent
    k_ptr, k_stride_b, k_stride_h, k_stride_t,  # (B, H / GROUP, n_keys, HEAD)
    v_ptr, v_stride_b, v_stride_h, v_stride_t,  # (B, H / GROUP, n_keys, HEAD)
    out_ptr,  # (B, n_queries, H, HEAD), contiguous
    dout_ptr,  # (B, n_queries, H, HEAD), contiguous
    lse_ptr,  # (B, H, 1, n_queries), contiguous; base 2. APART: (B, H, 2, n_queries)
    delta_ptr,  # (B, H, n_queries), contiguous; written here, read by the other kernel
    dq_ptr, dq_stride_t,  # (B, n_queries, H, HEAD), contiguous but for the token stride
    doc_start_ptr,  # (B, n_queries), contiguous; read only if PACKED
    key_lengths_ptr,  # (B), contiguous; read only if LENGTHS
    seed_ptr,  # (1), read only if DROPOUT
    dropout_offset,
    n_head, n_queries, n_keys, qk_scale, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, LENGTHS: tl.constexpr, GROUP: tl.constexpr,
    DROPOUT: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(n_queries, BLOCK_M)
    batch_head = tl.program_id(0) // n_blocks
    start_m = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_queries

    q_ptr = _head(q_ptr, q_stride_b, q_stride_h, batch_head, n_head)
    k_ptr = _head(k_ptr, k_stride_b, k_stride_h, batch_head // GROUP, n_head // GROUP)
    v_ptr = _head(v_ptr, v_stride_b, v_stride_h, batch_head // GROUP, n_head // GROUP)
    out_stride_t = n_head * HEAD
    out_stride_b = tl.cast(n_queries, tl.int64) * out_stride_t
    out_ptr = _head(out_ptr, out_stride_b, HEAD, batch_head, n_head)
    dout_ptr = _head(dout_ptr, out_stride_b, HEAD, batch_head, n_head)
    row_offset = batch_head.to(tl.int64) * n_queries

    out = _load_tile(out_ptr, out_stride_t, start_m, n_queries, True, HEAD, BLOCK_M, BLOCK_D)
    dout = _load_tile(dout_ptr, out_stride_t, start_m, n_queries, True, HEAD, BLOCK_M, BLOCK_D)
    delta = tl.sum(out.to(ACC) * dout.to(ACC), axis=1)
    tl.store(delta_ptr + row_offset + offs_m, delta, mask=mask_m)
    lse_ptr = _lse_of(lse_ptr, batch_head, n_queries, APART)
    lse, log_sum = _load_lse(lse_ptr, offs_m, n_queries, APART)
    q = _load_tile(q_ptr, q_stride_t, start_m, n_queries, True, HEAD, BLOCK_M, BLOCK_D)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    if LENGTHS:
        n_keys = _key_length(key_lengths_ptr, batch_head // n_head, n_keys)

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    if CAUSAL:
        unmasked_hi = tl.minimum(start_m, n_keys) // BLOCK_N * BLOCK_N
        hi = tl.minimum(start_m + BLOCK_M, n_keys)
    else:
        unmasked_hi = n_keys // BLOCK_N * BLOCK_N
        hi = n_keys
    lo, unmasked_lo = 0, 0
    if PACKED:
        doc_start_ptr += (batch_head // n_head).to(tl.int64) * n_queries
        lo, unmasked_lo = _document_bounds(
            doc_start_ptr, start_m, n_queries, unmasked_hi, BLOCK_M, BLOCK_N
        )
    gap = unmasked_hi - unmasked_lo
    for stage in tl.static_range(2):  # the unmasked loop last, under an `if`: see the forward
        if stage == 1:
            start, stop = unmasked_lo, unmasked_hi
        else:
            start, stop = (lo, hi - gap) if PACKED else (unmasked_hi, hi)
        if start < stop:
            dq = _attention_dq_tiles(
                dq, q, dout, lse, log_sum, delta, offs_m, n_queries, doc_start_ptr,
                k_ptr, k_stride_t, v_ptr, v_stride_t,
                start, stop, unmasked_lo, gap, n_keys, qk_scale, seed, dropout_offset, batch_head,
                threshold, keep_scale, stage == 0, CAUSAL, PACKED, DROPOUT, APART, PRECISION, ACC,
                HEAD, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    dq_ptr = _head(dq_ptr, tl.cast(n_queries, tl.int64) * dq_stride_t, HEAD, batch_head, n_head)
    _store_tile(dq_ptr, dq_stride_t, start_m, n_queries, dq * scale, HEAD, BLOCK_M, BLOCK_D)


@triton.jit
def _in_registers(x):
    """Force the 16-bit x to be computed before what follows. Otherwise the compiler moves
    arithmetic past wgmma.fence, where PTX forbids writing an operand's registers, and ptxas splits
    the group of products. Empty volatile assembly is not moved past it; CUTLASS does the same."""
    return tl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def _later_head(ptr, stride_h, member, GROUP: tl.constexpr):
    """Pointer to query head number ``member`` of the group."""
    if GROUP > 1:
        ptr += tl.cast(member, tl.int64) * stride_h
    return ptr


@triton.jit
def _attention_dkdv_tiles(
    dk, dv, k, v, start_n, offs_n,
    q_ptr, q_stride_h, q_stride_t, dout_ptr, dout_stride_t, lse_ptr, delta_ptr, doc_start_ptr,
    lo, hi, n_queries, qk_scale, seed, dropout_offset, batch_head, threshold, keep_scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
    DROPOUT: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WGMMA: tl.constexpr,
):  # fmt: skip
    """Accumulate the terms of queries lo .. hi of each head in dk / scale and dv / keep_scale.
    Scores are transposed, (N, M), so that the products for dV and dK read P and dS from registers.

    Heads and tiles share one loop. Inside an outer loop over heads, other loops would follow the
    unmasked one, and ptxas would serialise every wgmma (see the forward)."""
    stop = hi
    if GROUP > 1:
        span = tl.cdiv(hi - lo, BLOCK_M) * BLOCK_M
        stop = lo + GROUP * span
    for at in range(lo, stop, BLOCK_M):
        member, start_m = 0, at
        if GROUP > 1:
            member = (at - lo) // span
            start_m = at - member * span
        head_q_ptr = _later_head(q_ptr, q_stride_h, member, GROUP)
        head_dout_ptr = _later_head(dout_ptr, HEAD, member, GROUP)
        head_lse_ptr = _later_head(lse_ptr, n_queries * (2 if APART else 1), member, GROUP)
        head_delta_ptr = _later_head(delta_ptr, n_queries, member, GROUP)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = _load_tile(head_q_ptr, q_stride_t, start_m, n_queries, MASKED, HEAD, BLOCK_M, BLOCK_D)
        dout = _load_tile(
            head_dout_ptr, dout_stride_t, start_m, n_queries, MASKED, HEAD, BLOCK_M, BLOCK_D
        )
        # Past the last query, q, dout and delta are 0, so those rows add 0 to both sums.
        lse, log_sum = _load_lse(head_lse_ptr, offs_m, n_queries, APART)
        delta = tl.load(head_delta_ptr + offs_m, mask=offs_m < n_queries, other=0.0)
        scores_t = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC)
        probs_t = _probabilities(scores_t, lse[None, :], log_sum[None, :], qk_scale, APART)
        dprobs_t = tl.dot(v, tl.trans(dout), input_precision=PRECISION, out_dtype=ACC)
        dropped_t = probs_t
        if DROPOUT:
            keep = dropout_keep(
                seed, dropout_offset, batch_head + member, start_n, offs_m, threshold,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            keep_t = tl.trans(keep)
            dropped_t = tl.where(keep_t, probs_t, 0.0)
            dprobs_t = tl.where(keep_t, dprobs_t * keep_scale, 0.0)
        dscores_t = probs_t * (dprobs_t - delta[None, :])
        if MASKED and CAUSAL:
            visible_t = offs_m[None, :] >= offs_n[:, None]
            if PACKED:
                first_m = _first_keys(doc_start_ptr, offs_m, n_queries)
                visible_t = visible_t & (first_m[None, :] <= offs_n[:, None])
            dropped_t = tl.where(visible_t, dropped_t, 0.0)
            dscores_t = tl.where(visible_t, dscores_t, 0.0)
        if WGMMA:  # otherwise dS is rounded after the first product: fewer registers
            dropped_t = _in_registers(dropped_t.to(dout.dtype))
            dscores_t = _in_registers(dscores_t.to(q.dtype))
        dv = tl.dot(dropped_t.to(dout.dtype), dout, dv, input_precision=PRECISION, out_dtype=ACC)
        dk = tl.dot(dscores_t.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit(
    do_not_specialize=["dropout_offset"],
    do_not_specialize_on_alignment=["seed_ptr", "key_lengths_ptr"],
)
def _attention_bwd_dkdv_kernel(
    q_ptr, q_stride_b, q_stride_h, q_stride_t,  # (B, H, n_queries, HEAD), HEAD adjacent
    k_ptr, k_stride_b, k_stride_h, k_stride_t,  # (B, H / GROUP, n_keys, HEAD)
    v_ptr, v_stride_b, v_stride_h, v_stride_t,  # (B, H / GROUP, n_keys, HEAD)
    dout_ptr,  # (B, n_queries, H, HEAD), contiguous
    lse_ptr,  # (B, H, 1, n_queries), contiguous; base 2. APART: (B, H, 2, n_queries)
    delta_ptr,  # (B, H, n_queries), contiguous
    dk_ptr, dv_ptr, dkdv_stride_t,  # (B, n_keys, H / GROUP, HEAD), contiguous but for that stride
    doc_start_ptr,  # (B, n_queries), contiguous; read only if PACKED
    doc_end_ptr,  # (B, n_keys), contiguous; read only if PACKED: the end of each key's queries
    key_lengths_ptr,  # (B), contiguous; read only if LENGTHS
    seed_ptr,  # (1), read only if DROPOUT
    dropout_offset,
    n_head, n_queries, n_keys, qk_scale, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, LENGTHS: tl.constexpr, GROUP: tl.constexpr,
    DROPOUT: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WGMMA: tl.constexpr = False,
):  # fmt: skip
    # The first keys have the most queries: the longest columns of tiles start first.
    n_blocks = tl.cdiv(n_keys, BLOCK_N)
    kv_head = tl.program_id(0) // n_blocks
    batch_head = kv_head * GROUP  # the first query head of the group
    start_n = (tl.program_id(0) % n_blocks) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)

    q_ptr = _head(q_ptr, q_stride_b, q_stride_h, batch_head, n_head)
    k_ptr = _head(k_ptr, k_stride_b, k_stride_h, kv_head, n_head // GROUP)
    v_ptr = _head(v_ptr, v_stride_b, v_stride_h, kv_head, n_head // GROUP)
    dout_stride_t = n_head * HEAD
    dout_stride_b = tl.cast(n_queries, tl.int64) * dout_stride_t
    dout_ptr = _head(dout_ptr, dout_stride_b, HEAD, batch_head, n_head)
    lse_ptr = _lse_of(lse_ptr, batch_head, n_queries, APART)
    delta_ptr += batch_head.to(tl.int64) * n_queries

    length = n_keys
    if LENGTHS:
        length = _key_length(key_lengths_ptr, batch_head // n_head, n_keys)
    k = _load_tile(k_ptr, k_stride_t, start_n, length, True, HEAD, BLOCK_N, BLOCK_D)
    v = _load_tile(v_ptr, v_stride_t, start_n, length, True, HEAD, BLOCK_N, BLOCK_D)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    # Masked: queries on the diagonal (lo .. unmasked_lo), and the last ones (unmasked_hi .. hi),
    # which do not fill a tile or do not see every key.
    hi_of_all, hi = n_queries, n_queries  # the end of the queries that see all keys, or any key
    if PACKED:
        doc_start_ptr += (batch_head // n_head).to(tl.int64) * n_queries
        doc_end_ptr += (batch_head // n_head).to(tl.int64) * n_keys
        hi_of_all = tl.load(doc_end_ptr + start_n)
        hi = tl.load(doc_end_ptr + tl.minimum(start_n + BLOCK_N, n_keys) - 1)
    if LENGTHS:  # a tile of padding has no queries
        hi = tl.where(start_n < length, hi, 0)
        hi_of_all = hi
    if CAUSAL:
        lo = start_n // BLOCK_M * BLOCK_M
        unmasked_lo = tl.cdiv(start_n + BLOCK_N - 1, BLOCK_M) * BLOCK_M
    else:  # only the last tile's loads need a mask: one loop serves all tiles
        lo, unmasked_lo = 0, hi
    unmasked_hi = tl.maximum(unmasked_lo, hi_of_all // BLOCK_M * BLOCK_M)
    for stage in tl.static_range(3 if CAUSAL else 1):  # the unmasked loop last: see the forward
        if stage == 0:
            start, stop = lo, tl.minimum(unmasked_lo, hi)
        elif stage == 1:
            start, stop = unmasked_hi, hi
        else:
            start, stop = unmasked_lo, unmasked_hi
        if start < stop:
            dk, dv = _attention_dkdv_tiles(
                dk, dv, k, v, start_n, offs_n,
                q_ptr, q_stride_h, q_stride_t, dout_ptr, dout_stride_t, lse_ptr, delta_ptr,
                doc_start_ptr,
                start, stop, n_queries, qk_scale, seed, dropout_offset, batch_head, threshold,
                keep_scale, stage < 2, CAUSAL, PACKED, GROUP, DROPOUT, APART, PRECISION, ACC,
                HEAD, BLOCK_M, BLOCK_N, BLOCK_D, WGMMA,
            )  # fmt: skip
    if DROPOUT:
        dv = dv * keep_scale
    if LENGTHS:
        exists = (offs_n < length)[:, None]
        dk, dv = tl.where(exists, dk, 0.0), tl.where(exists, dv, 0.0)
    stride_b = tl.cast(n_keys, tl.int64) * dkdv_stride_t
    dk_ptr = _head(dk_ptr, stride_b, HEAD, kv_head, n_head // GROUP)
    dv_ptr = _head(dv_ptr, stride_b, HEAD, kv_head, n_head // GROUP)
    _store_tile(dk_ptr, dkdv_stride_t, start_n, n_keys, dk * scale, HEAD, BLOCK_N, BLOCK_D)
    _store_tile(dv_ptr, dkdv_stride_t, start_n, n_keys, dv, HEAD, BLOCK_N, BLOCK_D)


def _doc_end(doc_start: Tensor) -> Tensor:
    """(B, T) int32: the end of the queries that see each key."""
    keys = torch.arange(doc_start.shape[1], dtype=torch.int32, device=doc_start.device)
    return torch.searchsorted(doc_start, keys.repeat(len(doc_start), 1), right=True, out_int32=True)


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
    options: Options,
) -> None:
    """Write dq, dk and dv (B, T, H, D), which are contiguous except for the token stride."""
    q, k, v, lse = aligned(q), aligned(k), aligned(v), lse.contiguous()
    batch, n_head, n_queries, _ = q.shape
    delta = torch.empty_like(lse[:, :, 0])
    read = dict(dout_ptr=dout.contiguous(), lse_ptr=lse, delta_ptr=delta, scale=options.scale)
    read |= arguments(q, k, v, options)
    with _host.on_device(q):
        if dq.numel():
            config = launch("bwd_dq", q, read)
            grid = (_host.cdiv(n_queries, config["BLOCK_M"]) * batch * n_head,)
            _attention_bwd_dq_kernel[grid](
                out_ptr=out.contiguous(), dq_ptr=dq, dq_stride_t=dq.stride(1), **read, **config
            )
        if dk.numel():
            config = launch("bwd_dkdv", q, read)
            wgmma = _host.is_half(q.dtype) and _host.capability(q.device) == 90
            grid = (_host.cdiv(k.shape[2], config["BLOCK_N"]) * batch * k.shape[1],)
            _attention_bwd_dkdv_kernel[grid](
                dk_ptr=dk,
                dv_ptr=dv,
                dkdv_stride_t=dk.stride(1),
                doc_end_ptr=None
                if options.doc_start is None
                else _doc_end(options.doc_start.contiguous()),
                WGMMA=wgmma,
                **read,
                **config,
            )
