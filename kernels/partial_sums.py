"""Sums over many rows in two steps without atomics, bitwise reproducible: another kernel writes one
row of partial sums per block of rows, and the kernel here adds these up."""

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _host, configs
from fastgpt.kernels.configs import Tile


@triton.jit
def _sum_row_blocks_kernel(
    partial_ptr,  # (1 to 3, n_row_blocks, n_cols): one matrix for each output
    out0_ptr,  # (n_cols)
    out1_ptr,  # (n_cols), or None
    out2_ptr,  # (n_cols), or None
    n_row_blocks,
    n_cols,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    parameter = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_cols
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in range(0, n_row_blocks, BLOCK_M):
        rows = (parameter * n_row_blocks + start + offs_m).to(tl.int64)
        mask = (start + offs_m < n_row_blocks)[:, None] & mask_n[None, :]
        acc += tl.load(partial_ptr + rows[:, None] * n_cols + offs_n[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, axis=0).to(out0_ptr.dtype.element_ty)
    if parameter == 0:
        tl.store(out0_ptr + offs_n, total, mask=mask_n)
    if out1_ptr is not None:
        if parameter == 1:
            tl.store(out1_ptr + offs_n, total, mask=mask_n)
    if out2_ptr is not None:
        if parameter == 2:
            tl.store(out2_ptr + offs_n, total, mask=mask_n)


def sum_row_blocks(partial: Tensor, outs: list[Tensor], config: Tile) -> None:
    """Sum ``partial`` (len(outs), row blocks, ...), contiguous, in accumulator precision, over the
    row blocks into the one to three ``outs``, of shape (...) and any dtype."""
    n_row_blocks, n_cols = partial.shape[1], outs[0].numel()
    with _host.on_device(partial):
        _sum_row_blocks_kernel[(_host.cdiv(n_cols, config.BLOCK_N), len(outs))](
            partial,
            *outs,
            *[None] * (3 - len(outs)),
            n_row_blocks,
            n_cols,
            ACC=_host.accumulator(partial.dtype),
            **configs.launch(config),
        )
