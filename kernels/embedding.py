"""Token embedding + position embedding + dropout, forward and backward.

    out[b, t] = dropout(token_weight[idx[b, t]] + position_weight[t])

idx is (B, T), token_weight (V, C), position_weight (P, C) with P >= T, out (B, T, C). Saved for
backward: idx; the dropout mask is drawn again. With g = dropout's backward of dout:

    dtoken_weight[v] = sum of g[b, t] over idx[b, t] = v      dposition_weight[t] = sum over b of g

Bytes moved, s an element of out and w of the weights: forward s B T C written, w (U + T) C read for
U different tokens; backward twice s B T C read, w (V + P) C written. A few FLOPs an element (with
dropout about 25 for its random bits), so memory bounds all.

Both sums have a fixed order and no atomics, so two runs give the same bits. For dtoken_weight the
ids are sorted once, stably; each run of equal ids is summed by one program, in float32. Lest a
frequent token be the work of one program, every BAND sorted places that hold one id alone are
summed beforehand, by a program each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _checks, _common
from fastgpt.kernels._common import dropout_keep
from fastgpt.kernels._costs import KernelCost, nbytes, register_cost


@triton.jit(do_not_specialize=["stream"], do_not_specialize_on_alignment=["seed_ptr"])
def _embedding_fwd_kernel(
    idx_ptr,  # (n_rows), n_rows = B * T
    token_ptr,  # (n_vocab, n_cols), contiguous
    position_ptr,  # (at least T, n_cols), contiguous
    out_ptr,  # (n_rows, n_cols), contiguous
    seed_ptr,  # (1), read only if DROPOUT
    stream,
    n_rows,
    length,  # T
    n_vocab,
    n_cols,
    threshold,
    keep_scale,
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
    position_ptrs = position_ptr + (offs_m % length)[:, None] * n_cols + offs_n[None, :]
    x += tl.load(position_ptrs, mask=mask, other=0.0).to(ACC)
    if DROPOUT:
        seed, rows = tl.load(seed_ptr), offs_m.to(tl.int32)
        keep = dropout_keep(seed, stream, 0, start_n, rows, threshold, BLOCK_M, BLOCK_N)
        x = tl.where(keep, x * keep_scale, 0.0)
    x = tl.where(known[:, None], x, float("nan"))
    out_ptrs = out_ptr + offs_m[:, None] * n_cols + offs_n[None, :]
    tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_gradient(
    dout_ptr, rows, mask_m, seed_ptr, stream, n_cols, threshold, keep_scale,
    DROPOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N): these rows of dropout's backward of dout, this program's columns."""
    start_n = tl.program_id(1) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask = mask_m[:, None] & (offs_n < n_cols)[None, :]
    grad_ptrs = dout_ptr + rows[:, None] * n_cols + offs_n[None, :]
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(ACC)
    if DROPOUT:
        seed = tl.load(seed_ptr)
        keep = dropout_keep(
            seed, stream, 0, start_n, rows.to(tl.int32), threshold, BLOCK_M, BLOCK_N
        )
        grad = tl.where(keep, grad * keep_scale, 0.0)
    return grad


@triton.jit
def _sum_places(
    acc, begin, end, order_ptr,
    dout_ptr, seed_ptr, stream, n_cols, threshold, keep_scale,
    DROPOUT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc plus the gradients of the sorted places begin .. end."""
    for start in range(begin, end, BLOCK_M):
        places = start + tl.arange(0, BLOCK_M)
        rows = tl.load(order_ptr + places, mask=places < end, other=0)
        acc += _load_gradient(
            dout_ptr, rows, places < end, seed_ptr, stream, n_cols, threshold, keep_scale,
            DROPOUT, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["stream"], do_not_specialize_on_alignment=["seed_ptr"])
def _embedding_bwd_bands_kernel(
    sorted_ptr,  # (n_rows): the ids in order
    order_ptr,  # (n_rows): the row of each
    dout_ptr,  # (n_rows, n_cols), contiguous
    partial_ptr,  # (bands, n_cols), written where a band holds one id alone
    seed_ptr,  # (1), read only if DROPOUT
    stream,
    n_cols,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    BAND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    band = tl.program_id(0).to(tl.int64)
    begin = band * BAND
    if tl.load(sorted_ptr + begin) == tl.load(sorted_ptr + begin + BAND - 1):
        acc = _sum_places(
            tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC), begin, begin + BAND, order_ptr,
            dout_ptr, seed_ptr, stream, n_cols, threshold, keep_scale,
            DROPOUT, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(partial_ptr + band * n_cols + offs_n, tl.sum(acc, axis=0), mask=offs_n < n_cols)


@triton.jit(do_not_specialize=["stream"], do_not_specialize_on_alignment=["seed_ptr"])
def _embedding_bwd_token_kernel(
    sorted_ptr,  # (n_rows): the ids in order
    order_ptr,  # (n_rows): the row of each
    ends_ptr,  # (n_rows): where the run of equal ids ends
    dout_ptr,  # (n_rows, n_cols), contiguous
    partial_ptr,  # (n_rows // BAND, n_cols)
    dtoken_ptr,  # (n_vocab, n_cols), contiguous; zero
    seed_ptr,  # (1), read only if DROPOUT
    stream,
    n_vocab,
    n_cols,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    BAND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64)
    token = tl.load(sorted_ptr + begin).to(tl.int64)
    before = tl.load(sorted_ptr + begin - 1, mask=begin > 0, other=-1).to(tl.int64)
    if (token != before) & (token >= 0) & (token < n_vocab):  # the run's first place
        end = tl.load(ends_ptr + begin)
        first_band = (begin + BAND - 1) // BAND
        last_band = tl.maximum(end // BAND, first_band)  # the first one that is not whole
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n_cols
        acc = _sum_places(
            tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC),
            begin, tl.minimum(first_band * BAND, end), order_ptr,
            dout_ptr, seed_ptr, stream, n_cols, threshold, keep_scale,
            DROPOUT, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        for start in range(first_band, last_band, BLOCK_M):
            bands = start + tl.arange(0, BLOCK_M)
            mask = (bands < last_band)[:, None] & mask_n[None, :]
            partial_ptrs = partial_ptr + bands[:, None] * n_cols + offs_n[None, :]
            acc += tl.load(partial_ptrs, mask=mask, other=0.0)
        acc = _sum_places(
            acc, last_band * BAND, end, order_ptr,
            dout_ptr, seed_ptr, stream, n_cols, threshold, keep_scale,
            DROPOUT, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        total = tl.sum(acc, axis=0).to(dtoken_ptr.dtype.element_ty)
        tl.store(dtoken_ptr + token * n_cols + offs_n, total, mask=mask_n)


@triton.jit(do_not_specialize=["stream"], do_not_specialize_on_alignment=["seed_ptr"])
def _embedding_bwd_position_kernel(
    idx_ptr,  # (batch, length)
    dout_ptr,  # (batch * length, n_cols), contiguous
    dposition_ptr,  # (at least length, n_cols), contiguous
    seed_ptr,  # (1), read only if DROPOUT
    stream,
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
            dout_ptr, rows, (ids >= 0) & (ids < n_vocab), seed_ptr, stream, n_cols, threshold,
            keep_scale, DROPOUT, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.sum(acc, axis=0).to(dposition_ptr.dtype.element_ty)
    tl.store(dposition_ptr + position * n_cols + offs_n, total, mask=offs_n < n_cols)


# Forward and position: 16 elements a thread, in columns that divide GPT-2's widths. Token: most
# runs are short, so few programs with long rows. Chosen by ahead-of-time compilation (no spill on
# sm_80, sm_90, sm_100), not yet measured.
BAND = 64
_LAUNCH = dict(BLOCK_M=16, BLOCK_N=128, num_warps=4)


def _token_launch(n_cols: int) -> dict[str, int]:
    block_n = min(1024, max(32, triton.next_power_of_2(n_cols)))
    return dict(BLOCK_M=min(16, 4096 // block_n), BLOCK_N=block_n, num_warps=4)


def _dropout_numbers(dropout_p: float) -> dict[str, float]:
    threshold, keep_scale = _common.dropout_numbers(dropout_p)
    return dict(threshold=threshold, keep_scale=keep_scale, DROPOUT=threshold > 0)


@torch.library.custom_op("fastgpt::embedding", mutates_args=())
def _embedding_op(
    idx: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    stream: int,
    out_dtype: torch.dtype,
) -> Tensor:
    n_vocab, n_cols = token_weight.shape
    out = torch.empty(*idx.shape, n_cols, dtype=out_dtype, device=idx.device)
    if idx.numel():
        grid = triton.cdiv(idx.numel(), _LAUNCH["BLOCK_M"]), triton.cdiv(n_cols, _LAUNCH["BLOCK_N"])
        with _common.on_device(idx):
            _embedding_fwd_kernel[grid](
                idx.contiguous(),
                token_weight.contiguous(),
                position_weight.contiguous(),
                out,
                seed,
                stream,
                idx.numel(),
                idx.shape[1],
                n_vocab,
                n_cols,
                ACC=_common.accumulator(token_weight.dtype),
                **_dropout_numbers(dropout_p),
                **_LAUNCH,
            )
    return out


@torch.library.custom_op("fastgpt::embedding_bwd_token", mutates_args=())
def _token_bwd_op(
    dout: Tensor,
    idx: Tensor,
    seed: Tensor | None,
    n_vocab: int,
    dtype: torch.dtype,
    dropout_p: float,
    stream: int,
) -> Tensor:
    """The gradient of token_weight (n_vocab, C), dense."""
    n_rows, n_cols = idx.numel(), dout.shape[2]
    dtoken = torch.zeros(n_vocab, n_cols, dtype=dtype, device=dout.device)
    if n_rows == 0:
        return dtoken
    dout = dout.contiguous()
    ids, order = torch.sort(idx.flatten(), stable=True)
    ends = torch.searchsorted(ids, ids, right=True)
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    partial = torch.empty(n_rows // BAND, n_cols, dtype=statistic, device=dout.device)
    launch = _token_launch(n_cols)
    column_blocks = triton.cdiv(n_cols, launch["BLOCK_N"])
    options = dict(
        BAND=BAND, ACC=_common.accumulator(dtype), **_dropout_numbers(dropout_p), **launch
    )
    with _common.on_device(dout):
        if len(partial):
            _embedding_bwd_bands_kernel[(len(partial), column_blocks)](
                ids, order, dout, partial, seed, stream, n_cols, **options
            )
        _embedding_bwd_token_kernel[(n_rows, column_blocks)](
            ids, order, ends, dout, partial, dtoken, seed, stream, n_vocab, n_cols, **options
        )
    return dtoken


@torch.library.custom_op("fastgpt::embedding_bwd_position", mutates_args=())
def _position_bwd_op(
    dout: Tensor,
    idx: Tensor,
    seed: Tensor | None,
    n_vocab: int,
    n_positions: int,
    dtype: torch.dtype,
    dropout_p: float,
    stream: int,
) -> Tensor:
    """The gradient of position_weight (n_positions, C)."""
    (batch, length), n_cols = idx.shape, dout.shape[2]
    if idx.numel() == 0:
        return torch.zeros(n_positions, n_cols, dtype=dtype, device=dout.device)
    dposition = torch.empty(n_positions, n_cols, dtype=dtype, device=dout.device)
    with _common.on_device(dout):
        _embedding_bwd_position_kernel[(n_positions, triton.cdiv(n_cols, _LAUNCH["BLOCK_N"]))](
            idx.contiguous(),
            dout.contiguous(),
            dposition,
            seed,
            stream,
            batch,
            length,
            n_vocab,
            n_cols,
            ACC=_common.accumulator(dtype),
            **_dropout_numbers(dropout_p),
            **_LAUNCH,
        )
    return dposition


@_embedding_op.register_fake
def _(idx, token_weight, position_weight, seed, dropout_p, stream, out_dtype):
    return token_weight.new_empty(*idx.shape, token_weight.shape[1], dtype=out_dtype)


@_token_bwd_op.register_fake
def _(dout, idx, seed, n_vocab, dtype, dropout_p, stream):
    return dout.new_empty(n_vocab, dout.shape[2], dtype=dtype)


@_position_bwd_op.register_fake
def _(dout, idx, seed, n_vocab, n_positions, dtype, dropout_p, stream):
    return dout.new_empty(n_positions, dout.shape[2], dtype=dtype)


def _setup_context(ctx, inputs, output):
    idx, token_weight, position_weight, seed, ctx.dropout_p, ctx.stream, _ = inputs
    ctx.save_for_backward(idx, seed)
    ctx.n_vocab, ctx.n_positions = token_weight.shape[0], position_weight.shape[0]
    ctx.dtype = token_weight.dtype


def _backward(ctx, dout):
    idx, seed = ctx.saved_tensors
    options = ctx.dtype, ctx.dropout_p, ctx.stream
    dtoken = dposition = None
    if ctx.needs_input_grad[1]:
        dtoken = _token_bwd_op(dout, idx, seed, ctx.n_vocab, *options)
    if ctx.needs_input_grad[2]:
        dposition = _position_bwd_op(dout, idx, seed, ctx.n_vocab, ctx.n_positions, *options)
    return None, dtoken, dposition, *[None] * 4


_embedding_op.register_autograd(_backward, setup_context=_setup_context)


# Rows of the tables are read once for each different id: at most as many as there are ids.
@register_cost(torch.ops.fastgpt.embedding)
def _(out, idx, token_weight, position_weight, *_options):
    rows = min(idx.numel(), token_weight.shape[0]) + idx.shape[1]
    tables = rows * token_weight.shape[1] * token_weight.element_size()
    return [KernelCost("embedding", 0, nbytes(idx, out) + tables)]


@register_cost(torch.ops.fastgpt.embedding_bwd_token)
def _(dtoken, dout, idx, *_options):
    sort = nbytes(idx) + idx.numel() * (idx.element_size() + 16)  # ids in; ids, order, ends out
    return [
        KernelCost("sort", 0, sort),
        KernelCost("embedding_bwd_token", 0, nbytes(dout, dtoken) + sort - nbytes(idx)),
    ]


def embedding(
    idx: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Sum of a token's and a position's embedding vector, with dropout. The backward is
    deterministic.

    Args:
        idx: (B, T) int64 or int32, on a CUDA device. The row of an id outside of 0 to V - 1 is NaN
            and has no part in any gradient (PyTorch's own kernel would end the process's use of
            the GPU).
        token_weight: (V, C); float32, float16 or bfloat16, on the same device.
        position_weight: (P, C) with P >= T, of token_weight's dtype.
        dropout_p: share of the sum that is set to 0, from 0 to 0.999, to the next 2^-16.
        seed: int64 tensor with one element on idx's device: the Philox key of the dropout mask,
            which is a function of seed, stream and position alone (``reference.dropout_mask`` of
            (B * T, C)). If None, each call draws one from PyTorch's generator for the device.
        stream: which of the independent masks of that seed, from 0 to 2^31 - 1.

    Returns:
        (B, T, C), contiguous: the head of the residual stream. Its dtype is the weights'; under
        autocast to bfloat16 it is bfloat16, whose range is float32's. Gradients have the weights'
        dtype and are summed in float32.

    Raises:
        TypeError: idx holds no int64 or int32, or a weight no floating-point numbers.
        ValueError: shapes, dtypes or devices do not go together, or an argument is out of range.
    """
    _checks.embedding(idx, token_weight, position_weight, dropout_p, seed, stream)
    _common.launchable(token_weight=token_weight, position_weight=position_weight)
    seed = _common.drawn_seed(seed, dropout_p, idx.device)
    autocast = _common.autocast_dtype(token_weight)
    out_dtype = autocast if autocast == torch.bfloat16 else token_weight.dtype
    return _embedding_op(idx, token_weight, position_weight, seed, dropout_p, stream, out_dtype)
