"""Token embedding + position embedding + dropout, forward and backward: kernels.

    out[b, t] = dropout(token_weight[idx[b, t]] + position_weight[t])

idx is (B, T), token_weight (V, C), position_weight (P, C) with P >= T, out (B, T, C). Saved for
backward: idx; the dropout mask is regenerated from the seed. With g = dropout's backward of dout:

    dtoken_weight[v] = sum of g[b, t] over idx[b, t] = v      dposition_weight[t] = sum over b of g

Several documents in one sequence (PACKED): the position of token t is t - doc_start[b, t] instead,
and dposition_weight is summed like dtoken_weight, with positions instead of ids.

Bytes moved at s bytes per element of out and w per element of the weights: forward s B T C written,
w (U + T) C read for U distinct tokens; backward twice s B T C read, w (V + P) C written. A few
FLOPs per element (with dropout about 25 for the random bits), so all kernels are memory-bound.

Both sums have a fixed order without atomics, so results are bitwise reproducible. For dtoken_weight
the ids are sorted once with a stable sort, and one program sums each run of equal ids in float32.
So that a frequent token is not left to a single program, each block of ROW_BLOCK sorted places that
all hold the same id is summed beforehand by its own program.
"""

import triton
import triton.language as tl

from fastgpt.kernels._device_math import dropout_keep


@triton.jit(do_not_specialize=["dropout_offset"], do_not_specialize_on_alignment=["seed_ptr"])
def _embedding_fwd_kernel(
    idx_ptr,  # (n_rows), n_rows = B * T
    token_ptr,  # (n_vocab, n_cols), contiguous
    position_ptr,  # (at least T, n_cols), contiguous
    out_ptr,  # (n_rows, n_cols), contiguous
    doc_start_ptr,  # (n_rows), read only if PACKED
    seed_ptr,  # (1), read only if DROPOUT
    dropout_offset,
    n_rows,
    length,  # T
    n_vocab,
    n_cols,
    threshold,
    keep_scale,
    PACKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_n = tl.program_id(1) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < n_rows, (offs_n < n_cols)[None, :]
    mask = mask_m[:, None] & mask_n

    ids = tl.load(idx_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    known = (ids >= 0) & (ids < n_vocab)
    token_ptrs = token_ptr + ids[:, None] * n_cols + offs_n[None, :]
    x = tl.load(token_ptrs, mask=mask & known[:, None], other=0.0).to(ACC)
    positions = offs_m % length
    if PACKED:  # clamp to [0, position], whatever doc_start holds
        doc_start = tl.load(doc_start_ptr + offs_m, mask=mask_m, other=0)
        positions = tl.maximum(positions - tl.maximum(doc_start, 0), 0)
    position_ptrs = position_ptr + positions[:, None] * n_cols + offs_n[None, :]
    x += tl.load(position_ptrs, mask=mask, other=0.0).to(ACC)
    if DROPOUT:
        seed, rows = tl.load(seed_ptr), offs_m.to(tl.int32)
        keep = dropout_keep(seed, dropout_offset, 0, start_n, rows, threshold, BLOCK_M, BLOCK_N)
        x = tl.where(keep, x * keep_scale, 0.0)
    x = tl.where(known[:, None], x, float("nan"))
    out_ptrs = out_ptr + offs_m[:, None] * n_cols + offs_n[None, :]
    tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_gradient(
    dout_ptr, rows, mask_m, seed_ptr, dropout_offset, n_cols, threshold, keep_scale,
    DROPOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N): dropout's backward of dout, for ``rows`` and this program's columns."""
    start_n = tl.program_id(1) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask = mask_m[:, None] & (offs_n < n_cols)[None, :]
    grad_ptrs = dout_ptr + rows[:, None] * n_cols + offs_n[None, :]
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(ACC)
    if DROPOUT:
        seed = tl.load(seed_ptr)
        keep = dropout_keep(
            seed, dropout_offset, 0, start_n, rows.to(tl.int32), threshold, BLOCK_M, BLOCK_N
        )
        grad = tl.where(keep, grad * keep_scale, 0.0)
    return grad


@triton.jit
def _sum_places(
    acc, begin, end, order_ptr,
    dout_ptr, seed_ptr, dropout_offset, n_cols, threshold, keep_scale,
    DROPOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc plus the gradients at the sorted places begin .. end."""
    for start in range(begin, end, BLOCK_M):
        places = start + tl.arange(0, BLOCK_M)
        rows = tl.load(order_ptr + places, mask=places < end, other=0)
        acc += _load_gradient(
            dout_ptr, rows, places < end, seed_ptr, dropout_offset, n_cols, threshold, keep_scale,
            DROPOUT, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["dropout_offset"], do_not_specialize_on_alignment=["seed_ptr"])
def _embedding_bwd_row_blocks_kernel(
    sorted_ptr,  # (n_rows): the ids in order
    order_ptr,  # (n_rows): the row of each
    dout_ptr,  # (n_rows, n_cols), contiguous
    partial_ptr,  # (row_blocks, n_cols), written if all ids of a row block are equal
    seed_ptr,  # (1), read only if DROPOUT
    dropout_offset,
    n_cols,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row_block = tl.program_id(0).to(tl.int64)
    begin = row_block * ROW_BLOCK
    if tl.load(sorted_ptr + begin) == tl.load(sorted_ptr + begin + ROW_BLOCK - 1):
        acc = _sum_places(
            tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC), begin, begin + ROW_BLOCK, order_ptr,
            dout_ptr, seed_ptr, dropout_offset, n_cols, threshold, keep_scale,
            DROPOUT, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(
            partial_ptr + row_block * n_cols + offs_n, tl.sum(acc, axis=0), mask=offs_n < n_cols
        )


@triton.jit(do_not_specialize=["dropout_offset"], do_not_specialize_on_alignment=["seed_ptr"])
def _embedding_bwd_token_kernel(
    sorted_ptr,  # (n_rows): the ids in order
    order_ptr,  # (n_rows): the row of each
    ends_ptr,  # (n_rows): the end of the run of equal ids
    dout_ptr,  # (n_rows, n_cols), contiguous
    partial_ptr,  # (n_rows // ROW_BLOCK, n_cols)
    dtoken_ptr,  # (n_vocab, n_cols), contiguous; zero
    seed_ptr,  # (1), read only if DROPOUT
    dropout_offset,
    n_vocab,
    n_cols,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64)
    token = tl.load(sorted_ptr + begin).to(tl.int64)
    before = tl.load(sorted_ptr + begin - 1, mask=begin > 0, other=-1).to(tl.int64)
    if (token != before) & (token >= 0) & (token < n_vocab):  # the run's first place
        end = tl.load(ends_ptr + begin)
        first_row_block = (begin + ROW_BLOCK - 1) // ROW_BLOCK
        # The end of the row blocks that lie completely in the run.
        last_row_block = tl.maximum(end // ROW_BLOCK, first_row_block)
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n_cols
        acc = _sum_places(
            tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC),
            begin, tl.minimum(first_row_block * ROW_BLOCK, end), order_ptr,
            dout_ptr, seed_ptr, dropout_offset, n_cols, threshold, keep_scale,
            DROPOUT, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        for start in range(first_row_block, last_row_block, BLOCK_M):
            row_blocks = start + tl.arange(0, BLOCK_M)
            mask = (row_blocks < last_row_block)[:, None] & mask_n[None, :]
            partial_ptrs = partial_ptr + row_blocks[:, None] * n_cols + offs_n[None, :]
            acc += tl.load(partial_ptrs, mask=mask, other=0.0)
        acc = _sum_places(
            acc, last_row_block * ROW_BLOCK, end, order_ptr,
            dout_ptr, seed_ptr, dropout_offset, n_cols, threshold, keep_scale,
            DROPOUT, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        total = tl.sum(acc, axis=0).to(dtoken_ptr.dtype.element_ty)
        tl.store(dtoken_ptr + token * n_cols + offs_n, total, mask=mask_n)


@triton.jit(do_not_specialize=["dropout_offset"], do_not_specialize_on_alignment=["seed_ptr"])
def _embedding_bwd_position_kernel(
    idx_ptr,  # (batch, length)
    dout_ptr,  # (batch * length, n_cols), contiguous
    dposition_ptr,  # (at least length, n_cols), contiguous
    seed_ptr,  # (1), read only if DROPOUT
    dropout_offset,
    batch,
    length,
    n_vocab,
    n_cols,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in range(0, tl.where(position < length, batch, 0), BLOCK_M):
        offs_b = start + tl.arange(0, BLOCK_M)
        rows = offs_b.to(tl.int64) * length + position
        ids = tl.load(idx_ptr + rows, mask=offs_b < batch, other=-1)
        acc += _load_gradient(
            dout_ptr, rows, (ids >= 0) & (ids < n_vocab), seed_ptr, dropout_offset, n_cols,
            threshold, keep_scale, DROPOUT, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.sum(acc, axis=0).to(dposition_ptr.dtype.element_ty)
    tl.store(dposition_ptr + position * n_cols + offs_n, total, mask=offs_n < n_cols)
