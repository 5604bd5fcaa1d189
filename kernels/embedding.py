"""Token + position embedding + dropout: launchers, operators, public function.

See ``embedding_kernels.py`` for the equations, saved tensors, bytes and the order of the sums.
"""

import torch
from torch import Tensor

from fastgpt.kernels import _checks, _host, configs
from fastgpt.kernels._operators import differentiable, fake, operator
from fastgpt.kernels.embedding_kernels import (
    _embedding_bwd_position_kernel,
    _embedding_bwd_row_blocks_kernel,
    _embedding_bwd_token_kernel,
    _embedding_fwd_kernel,
)

ROW_BLOCK = 64


def _launch(x: Tensor, kernel: str) -> dict[str, int]:
    size = max(32, _host.next_power_of_2(x.shape[-1]))
    return configs.launch(configs.find(x, "embedding", kernel, size))


@operator("embedding")
def _embedding_op(
    idx: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    seed: Tensor | None,
    doc_start: Tensor | None,
    dropout_p: float,
    dropout_offset: int,
    out_dtype: torch.dtype,
) -> Tensor:
    n_vocab, n_cols = token_weight.shape
    out = torch.empty(*idx.shape, n_cols, dtype=out_dtype, device=idx.device)
    if idx.numel():
        launch = _launch(token_weight, "fwd")
        grid = _host.cdiv(idx.numel(), launch["BLOCK_M"]), _host.cdiv(n_cols, launch["BLOCK_N"])
        with _host.on_device(idx):
            _embedding_fwd_kernel[grid](
                idx.contiguous(),
                token_weight.contiguous(),
                position_weight.contiguous(),
                out,
                None if doc_start is None else doc_start.contiguous(),
                seed,
                dropout_offset,
                idx.numel(),
                idx.shape[1],
                n_vocab,
                n_cols,
                PACKED=doc_start is not None,
                ACC=_host.accumulator(token_weight.dtype),
                **_host.dropout_arguments(dropout_p),
                **launch,
            )
    return out


@operator("embedding_bwd_token")
def _token_bwd_op(
    dout: Tensor,
    idx: Tensor,
    seed: Tensor | None,
    n_vocab: int,
    dtype: torch.dtype,
    dropout_p: float,
    dropout_offset: int,
) -> Tensor:
    """The dense gradient of token_weight (n_vocab, C), or of any table indexed by idx (B, T)."""
    n_rows, n_cols = idx.numel(), dout.shape[2]
    dtoken = torch.zeros(n_vocab, n_cols, dtype=dtype, device=dout.device)
    if n_rows == 0:
        return dtoken
    dout = dout.contiguous()
    ids, order = torch.sort(idx.flatten(), stable=True)
    ends = torch.searchsorted(ids, ids, right=True)
    partial = torch.empty(
        n_rows // ROW_BLOCK, n_cols, dtype=_host.stats_dtype(dtype), device=dout.device
    )
    launch = _launch(dout, "bwd_token")
    column_blocks = _host.cdiv(n_cols, launch["BLOCK_N"])
    options = dict(
        ROW_BLOCK=ROW_BLOCK,
        ACC=_host.accumulator(dtype),
        **_host.dropout_arguments(dropout_p),
        **launch,
    )
    with _host.on_device(dout):
        if len(partial):
            _embedding_bwd_row_blocks_kernel[(len(partial), column_blocks)](
                ids, order, dout, partial, seed, dropout_offset, n_cols, **options
            )
        _embedding_bwd_token_kernel[(n_rows, column_blocks)](
            ids,
            order,
            ends,
            dout,
            partial,
            dtoken,
            seed,
            dropout_offset,
            n_vocab,
            n_cols,
            **options,
        )
    return dtoken


@operator("embedding_bwd_position")
def _position_bwd_op(
    dout: Tensor,
    idx: Tensor,
    seed: Tensor | None,
    n_vocab: int,
    n_positions: int,
    dtype: torch.dtype,
    dropout_p: float,
    dropout_offset: int,
) -> Tensor:
    """The gradient of position_weight (n_positions, C)."""
    (batch, length), n_cols = idx.shape, dout.shape[2]
    if idx.numel() == 0:
        return torch.zeros(n_positions, n_cols, dtype=dtype, device=dout.device)
    dposition = torch.empty(n_positions, n_cols, dtype=dtype, device=dout.device)
    launch = _launch(dout, "bwd_position")
    with _host.on_device(dout):
        _embedding_bwd_position_kernel[(n_positions, _host.cdiv(n_cols, launch["BLOCK_N"]))](
            idx.contiguous(),
            dout.contiguous(),
            dposition,
            seed,
            dropout_offset,
            batch,
            length,
            n_vocab,
            n_cols,
            ACC=_host.accumulator(dtype),
            **_host.dropout_arguments(dropout_p),
            **launch,
        )
    return dposition


@fake(_embedding_op)
def _(idx, token_weight, position_weight, seed, doc_start, dropout_p, dropout_offset, out_dtype):
    return token_weight.new_empty(*idx.shape, token_weight.shape[1], dtype=out_dtype)


@fake(_token_bwd_op)
def _(dout, idx, seed, n_vocab, dtype, dropout_p, dropout_offset):
    return dout.new_empty(n_vocab, dout.shape[2], dtype=dtype)


@fake(_position_bwd_op)
def _(dout, idx, seed, n_vocab, n_positions, dtype, dropout_p, dropout_offset):
    return dout.new_empty(n_positions, dout.shape[2], dtype=dtype)


def _setup_context(ctx, inputs, output):
    idx, token_weight, position_weight, seed, doc_start, ctx.dropout_p, ctx.dropout_offset, _ = (
        inputs
    )
    ctx.save_for_backward(idx, seed, doc_start)
    ctx.n_vocab, ctx.n_positions = token_weight.shape[0], position_weight.shape[0]
    ctx.dtype = token_weight.dtype


def _backward(ctx, dout):
    idx, seed, doc_start = ctx.saved_tensors
    options = ctx.dtype, ctx.dropout_p, ctx.dropout_offset
    dtoken = dposition = None
    if ctx.needs_input_grad[1]:
        dtoken = _token_bwd_op(dout, idx, seed, ctx.n_vocab, *options)
    if ctx.needs_input_grad[2] and doc_start is not None:
        positions = _positions(idx, doc_start, ctx.n_vocab)
        dposition = _token_bwd_op(dout, positions, seed, ctx.n_positions, *options)
    elif ctx.needs_input_grad[2]:
        dposition = _position_bwd_op(dout, idx, seed, ctx.n_vocab, ctx.n_positions, *options)
    return None, dtoken, dposition


def _positions(idx: Tensor, doc_start: Tensor, n_vocab: int) -> Tensor:
    """(B, T) int32: the positions that the forward uses, -1 where an id is out of range."""
    places = torch.arange(idx.shape[1], dtype=torch.int32, device=idx.device)
    positions = (places - doc_start.clamp(min=0)).clamp(min=0)
    return positions.where((idx >= 0) & (idx < n_vocab), -1)


differentiable(_embedding_op, _backward, _setup_context)


def embedding(
    idx: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_offset: int = 0,
    doc_start: Tensor | None = None,
) -> Tensor:
    """Sum of token and position embeddings, with dropout. The backward is deterministic.

    Args:
        idx: (B, T) int64 or int32, on a CUDA device. The output row of an id outside of 0 to V - 1
            is NaN and contributes to no gradient (PyTorch's own kernel would fail with a device
            assert, after which the process cannot use the GPU).
        token_weight: (V, C); float32, float16 or bfloat16, on the same device.
        position_weight: (P, C) with P >= T, of token_weight's dtype.
        dropout_p: dropout probability, from 0 to 0.999, rounded to a multiple of 2^-16.
        seed: int64 tensor with one element on idx's device: the Philox key of the dropout mask. The
            mask depends only on seed, dropout_offset and position (it is ``reference.dropout_mask``
            of shape (B * T, C)). If None, each call draws a seed from PyTorch's generator for the
            device.
        dropout_offset: selects one of the seed's independent masks, from 0 to 2^31 - 1.
        doc_start: int32 (B, T), for several documents in one sequence: the position of token t is
            t - doc_start[b, t]. The host does not read the values; the kernels clamp them to
            [0, t].

    Returns:
        (B, T, C), contiguous: the start of the residual stream. Its dtype is the weights'; under
        bfloat16 autocast it is bfloat16, which has float32's range. Gradients have the weights'
        dtype and are summed in float32.

    Raises:
        TypeError: idx is not int64 or int32, or a weight is not a floating-point tensor.
        ValueError: shapes, dtypes or devices do not match, or an argument is out of range.
    """
    _checks.embedding(
        idx, token_weight, position_weight, dropout_p, seed, dropout_offset, doc_start
    )
    _host.launchable(token_weight=token_weight, position_weight=position_weight)
    seed = _host.drawn_seed(seed, dropout_p, idx.device)
    autocast = _host.autocast_dtype(token_weight)
    out_dtype = autocast if autocast == torch.bfloat16 else token_weight.dtype
    return _embedding_op(
        idx, token_weight, position_weight, seed, doc_start, dropout_p, dropout_offset, out_dtype
    )
