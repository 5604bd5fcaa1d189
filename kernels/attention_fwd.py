"""Softmax attention, causal or full, forward and backward, without a (Tq, Tk) matrix in memory.

    S = scale * Q Kᵀ     P = softmax(S) over the visible keys     O = dropout(P) V

q is (B, H, Tq, D), k and v (B, H, Tk, D), read by strides, packed (B, T, 3C) as much as separate.
The forward is the online softmax of FlashAttention-2 (Dao 2023, arXiv:2307.08691): a program owns a
block of queries, walks over the keys and rescales what it has when the running maximum grows. It
works in base 2: P = 2^(c Q Kᵀ - lse) with c = scale log2(e). Saved for backward: q, k, v, O, and
lse (B, H, 1, Tq) in float32.

For scores of some thousands lse has three digits behind the point, and an error of lse is one of
every probability of its row. In 16 bits those are rounded more than that, and c Q Kᵀ - lse is one
instruction. Where q, k and v have 32 bits, the maximum m of a row of Q Kᵀ and the sum of the
exponentials are kept APART: P = 2^(c (Q Kᵀ - m) - log2(sum)), where the first difference is exact
near the maximum. lse is then (B, H, 2, Tq): m and log2(sum).

    delta = sum over d of dO * O     dP = dropout(dO Vᵀ)     dS = P * (dP - delta)
    dQ = scale * dS K                dK = scale * dSᵀ Q      dV = dropout(P)ᵀ dO

The backward (``attention_backward_kernels.py``) recomputes P in two kernels, one owning queries
(dQ, and delta on its way), one owning keys (dK, dV): each sum has one owner and one order, so there
are no atomics and two runs give the same bits.

Several documents in one sequence (PACKED): query i sees the keys starts[i] <= j <= i, where starts
never falls, so a block of queries sees the keys from its first row's start on, and whole tiles of
them from its last row's start on; only tiles between the two, which a border crosses, are masked.
Of a tile of keys the queries end with its last key's document, and see all of it as far as its
first key's: they are looked up in ends[j], the number of starts up to j. (Counted by each program
they would take a reduction, after which the compiler keeps all of a tile in registers in float32.)

Bytes, s an element, C = H * D: 4 s B T C forward (q, k, v in; O out), 8 s B T C backward (q, k, v,
O, dO in; dQ, dK, dV out), beside what is read again, mostly from L2. FLOPs: 4 B H Tq Tk D forward,
14 B H Tq Tk D backward (10 if S and dP were computed once); half of that if causal. With documents
it is less, which depends on what stands in starts.
"""

import triton
import triton.language as tl

from fastgpt.kernels._device_math import dropout_keep, rounded_quotient


@triton.jit
def _head(ptr, stride_b, stride_h, batch_head, n_head):
    """Where head ``batch_head`` = b * n_head + h of a (B, H, T, D) tensor starts."""
    batch, head = (batch_head // n_head).to(tl.int64), (batch_head % n_head).to(tl.int64)
    return ptr + batch * stride_b + head * stride_h


@triton.jit
def _tile_ptrs(
    ptr, stride_t, start, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Pointers to rows start .. start + BLOCK_T; only the row of the tile needs 64 bits."""
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
    """(BLOCK_T, BLOCK_D) of a (n_rows, HEAD) matrix, 0 outside. Not MASKED: all its rows exist."""
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
    """Where head ``batch_head`` of lse starts."""
    return lse_ptr + batch_head.to(tl.int64) * n_queries * (2 if APART else 1)


@triton.jit
def _load_lse(lse_ptr, offs_m, n_queries, APART: tl.constexpr):
    """lse of these queries of a head, or if APART its two parts; else the second is not used."""
    mask = offs_m < n_queries
    lse = tl.load(lse_ptr + offs_m, mask=mask, other=0.0)
    log_sum = tl.load(lse_ptr + n_queries + offs_m, mask=mask, other=0.0) if APART else lse
    return lse, log_sum


@triton.jit
def _probabilities(scores, lse, log_sum, qk_scale, APART: tl.constexpr):
    """From ``_load_lse``'s numbers, of a shape to broadcast."""
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
    """A masked probability is 0, but 0 * NaN is NaN: no product may see what the mask hides."""
    return tl.where(_finite(x), x, 0.0)


@triton.jit
def _visible(
    offs_m, first_m, start_n, n_keys,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(M, BLOCK_N): query i sees key j if j exists and, when causal, j <= i, and when PACKED,
    j >= first_m of i. One comparison an element for each, of 32 bits, however wide the compiler
    makes start_n."""
    last = tl.zeros_like(offs_m) + (n_keys - 1)
    if CAUSAL:
        last = tl.minimum(last, offs_m)
    visible = (last - start_n)[:, None] >= tl.arange(0, BLOCK_N)[None, :]
    if PACKED:
        visible = visible & ((first_m - start_n)[:, None] <= tl.arange(0, BLOCK_N)[None, :])
    return visible


@triton.jit
def _first_keys(starts_ptr, rows, length):
    """starts of these rows; whatever it holds, every query sees a key: itself."""
    first = tl.load(starts_ptr + rows, mask=rows < length, other=0)
    return tl.maximum(tl.minimum(first, rows), 0)


@triton.jit
def _past_gap(at, gap_at, gap, SKIPS: tl.constexpr):
    """Where a tile begins if the loop, now at ``at``, leaves out as much as ``gap`` at gap_at."""
    if SKIPS:
        at += tl.where(at < gap_at, 0, gap)
    return at


@triton.jit
def _document_tiles(
    starts_ptr, start_m, n_queries, full, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Of the tiles of keys before ``full``: where the first begins that the block of queries sees,
    and where the first that all of them see whole."""
    first = _first_keys(starts_ptr, start_m, n_queries)
    last = _first_keys(starts_ptr, tl.minimum(start_m + BLOCK_M, n_queries) - 1, n_queries)
    return (
        tl.minimum(first // BLOCK_N * BLOCK_N, full),
        tl.minimum(tl.cdiv(last, BLOCK_N) * BLOCK_N, full),
    )


# -------------------------------------------------------------------------------------- forward


@triton.jit
def _softmax_step(
    scores, row_max, row_sum, offs_m, start_n, qk_scale, seed, stream, batch_head, threshold,
    APART: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Probabilities (BLOCK_M, BLOCK_N) of the keys from start_n on in terms of the new maximum,
    what sums in terms of the old one are to be multiplied by, and the new maximum and sum. The
    maximum is that of the scores if APART, else of the scores times qk_scale."""
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
        keep = dropout_keep(seed, stream, batch_head, start_n, offs_m, threshold, BLOCK_M, BLOCK_N)
        probs = tl.where(keep, probs, 0.0)
    return probs, rescale, new_max, row_sum


@triton.jit
def _attention_fwd_tiles(
    acc, row_max, row_sum,  # (BLOCK_M, BLOCK_D), (BLOCK_M), (BLOCK_M): the state of the softmax
    q, offs_m, first_m,
    k_ptr, k_stride_t, v_ptr, v_stride_t,
    start, stop, gap_at, gap, n_keys, qk_scale, seed, stream, batch_head, threshold,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr,
    APART: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attend to keys start .. stop. MASKED: the tiles cross the diagonal, the end of the keys or a
    border of documents; if PACKED, whole ones may lie between them, which are left out."""
    for at in range(start, stop, BLOCK_N):
        start_n = _past_gap(at, gap_at, gap, MASKED and PACKED)
        k = _load_tile(k_ptr, k_stride_t, start_n, n_keys, MASKED, HEAD, BLOCK_N, BLOCK_D)
        v = _load_tile(v_ptr, v_stride_t, start_n, n_keys, MASKED, HEAD, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if MASKED:
            # A value that is not finite must reach the rows that see it and no other.
            all_finite = tl.min(_finite(v).to(tl.int32), axis=1)
            scores = tl.where((all_finite == 1)[None, :], scores, float("nan"))
            v = _finite_or_zero(v)
            visible = _visible(offs_m, first_m, start_n, n_keys, CAUSAL, PACKED, BLOCK_N)
            scores = tl.where(visible, scores, float("-inf"))
        probs, rescale, row_max, row_sum = _softmax_step(
            scores, row_max, row_sum, offs_m, start_n, qk_scale, seed, stream, batch_head,
            threshold, APART, DROPOUT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        acc = acc * rescale[:, None]
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc, row_max, row_sum


@triton.jit
def _attention_fwd_tiles_late(
    acc, row_max, row_sum, q, offs_m,
    k_ptr, k_stride_t, v_ptr, v_stride_t,
    start, stop, n_keys, qk_scale, seed, stream, batch_head, threshold,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same for whole tiles, one or more, in 16 bits. The product with v comes a tile late: it
    runs beside the next tile's softmax, as neither waits for the other (FlashAttention-3, Shah et
    al. 2024, arXiv:2407.08608, section 3.2).

    The registers of a wgmma's operand must not be written before the wait for it. What the softmax
    leaves is carried in others, therefore, and becomes the operand by an operation behind that wait
    which the compiler cannot leave out: clearing the sign bit, of numbers that have none.
    """
    k = _load_tile(k_ptr, k_stride_t, start, n_keys, False, HEAD, BLOCK_N, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    probs, rescale, row_max, row_sum = _softmax_step(
        scores, row_max, row_sum, offs_m, start, qk_scale, seed, stream, batch_head,
        threshold, False, DROPOUT, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    # Carried as integers, for an operand that a loop carries as it is goes through shared memory.
    late = probs.to(q.dtype).to(tl.int16, bitcast=True)
    for start_n in range(start + BLOCK_N, stop, BLOCK_N):
        k = _load_tile(k_ptr, k_stride_t, start_n, n_keys, False, HEAD, BLOCK_N, BLOCK_D)
        v = _load_tile(v_ptr, v_stride_t, start_n - BLOCK_N, n_keys, False, HEAD, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        acc = acc * rescale[:, None]  # waits for the product before
        late = (late & 0x7FFF).to(v.dtype, bitcast=True)
        acc = tl.dot(late, v, acc, input_precision=PRECISION, out_dtype=ACC)
        probs, rescale, row_max, row_sum = _softmax_step(
            scores, row_max, row_sum, offs_m, start_n, qk_scale, seed, stream, batch_head,
            threshold, False, DROPOUT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        late = probs.to(q.dtype).to(tl.int16, bitcast=True)
    v = _load_tile(v_ptr, v_stride_t, stop - BLOCK_N, n_keys, False, HEAD, BLOCK_N, BLOCK_D)
    acc = acc * rescale[:, None]
    late = late.to(v.dtype, bitcast=True)
    acc = tl.dot(late, v, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["stream"], do_not_specialize_on_alignment=["seed_ptr"])
def _attention_fwd_kernel(
    q_ptr, q_stride_b, q_stride_h, q_stride_t,  # (B, H, n_queries, HEAD), HEAD adjacent
    k_ptr, k_stride_b, k_stride_h, k_stride_t,  # (B, H, n_keys, HEAD)
    v_ptr, v_stride_b, v_stride_h, v_stride_t,  # (B, H, n_keys, HEAD)
    out_ptr,  # (B, n_queries, H, HEAD), contiguous
    lse_ptr,  # (B, H, 1, n_queries), contiguous; base 2. APART: (B, H, 2, n_queries)
    starts_ptr,  # (B, n_queries), contiguous; read only if PACKED
    seed_ptr,  # (1), read only if DROPOUT
    stream,
    n_head, n_queries, n_keys, qk_scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, APART: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    LATE: tl.constexpr = False,
):  # fmt: skip
    # One grid dimension holds 2^31 programs; y and z only 65,535. The blocks of a head are
    # neighbours, so that its keys stay in L2, and the longest row of tiles goes first.
    n_blocks = tl.cdiv(n_queries, BLOCK_M)
    batch_head = tl.program_id(0) // n_blocks
    start_m = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)

    q_ptr = _head(q_ptr, q_stride_b, q_stride_h, batch_head, n_head)
    k_ptr = _head(k_ptr, k_stride_b, k_stride_h, batch_head, n_head)
    v_ptr = _head(v_ptr, v_stride_b, v_stride_h, batch_head, n_head)
    q = _load_tile(q_ptr, q_stride_t, start_m, n_queries, True, HEAD, BLOCK_M, BLOCK_D)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    row_sum = tl.zeros([BLOCK_M], dtype=ACC)
    # Tiles of keys that every query of the block sees: whole .. full. Behind them those with a
    # mask, whose first key every query sees, but in its own document only: there row_max must be
    # finite before it is known. ptxas waits for each wgmma before the next, everywhere, unless the
    # loop that leaves a product in flight is the last and stands on a condition.
    row_max = tl.full([BLOCK_M], -3.4028234663852886e38 if PACKED else float("-inf"), dtype=ACC)
    if CAUSAL:
        full = tl.minimum(start_m, n_keys) // BLOCK_N * BLOCK_N
        stop = tl.minimum(start_m + BLOCK_M, n_keys)
    else:
        full = n_keys // BLOCK_N * BLOCK_N
        stop = n_keys
    low, whole, first_m = 0, 0, offs_m
    if PACKED:
        starts_ptr += (batch_head // n_head).to(tl.int64) * n_queries
        low, whole = _document_tiles(starts_ptr, start_m, n_queries, full, BLOCK_M, BLOCK_N)
        first_m = _first_keys(starts_ptr, offs_m, n_queries)
    gap = full - whole
    acc, row_max, row_sum = _attention_fwd_tiles(
        acc, row_max, row_sum, q, offs_m, first_m, k_ptr, k_stride_t, v_ptr, v_stride_t,
        low if PACKED else full, stop - gap if PACKED else stop, whole, gap,
        n_keys, qk_scale, seed, stream, batch_head, threshold,
        True, CAUSAL, PACKED, DROPOUT, APART, PRECISION, ACC, HEAD, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if full > whole:
        if LATE:
            acc, row_max, row_sum = _attention_fwd_tiles_late(
                acc, row_max, row_sum, q, offs_m, k_ptr, k_stride_t, v_ptr, v_stride_t,
                whole, full, n_keys, qk_scale, seed, stream, batch_head, threshold,
                DROPOUT, PRECISION, ACC, HEAD, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        else:
            acc, row_max, row_sum = _attention_fwd_tiles(
                acc, row_max, row_sum, q, offs_m, first_m, k_ptr, k_stride_t, v_ptr, v_stride_t,
                whole, full, full, 0, n_keys, qk_scale, seed, stream, batch_head, threshold,
                False, CAUSAL, PACKED, DROPOUT, APART, PRECISION, ACC, HEAD,
                BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    # One division a row; the probability of a single key is exactly 1.
    out = acc * rounded_quotient(tl.full([BLOCK_M], 1.0, ACC), row_sum)[:, None]
    if DROPOUT:
        out = out * keep_scale
    out_stride_t = n_head * HEAD
    out_ptr = _head(out_ptr, tl.cast(n_queries, tl.int64) * out_stride_t, HEAD, batch_head, n_head)
    # As rows from 0 on: the mask that loaded q would occupy a register from there to here.
    out_ptr += start_m.to(tl.int64) * out_stride_t
    _store_tile(out_ptr, out_stride_t, 0, n_queries - start_m, out, HEAD, BLOCK_M, BLOCK_D)
    lse_ptr = _lse_of(lse_ptr, batch_head, n_queries, APART) + offs_m
    mask_m = offs_m < n_queries
    if APART:
        tl.store(lse_ptr, row_max, mask=mask_m)
        tl.store(lse_ptr + n_queries, tl.log2(row_sum), mask=mask_m)
    else:
        tl.store(lse_ptr, row_max + tl.log2(row_sum), mask=mask_m)
