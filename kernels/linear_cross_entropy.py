"""The language-model head and its cross-entropy without stored logits: the Triton op.

``chunked_loss`` has the equations and the loop over chunks of rows, whose three matrix products
are cuBLAS's. The one kernel here turns the logits of a chunk into losses and, in place, into
dlogits. A program has one row: it reads it twice, the second time from the L2 cache (100 KB a row
of GPT-2's in half precision), and writes it once. 2 s bytes an element, so memory bounds it: by
disassembly it issues 20 instructions an element on sm_90, where half precision at 4.3 TB/s leaves
time for 27.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _checks, _common, chunked_loss


@triton.jit
def _load_tile(row_ptr, start, padded_cols, n_cols, ACC: tl.constexpr, BLOCK_N: tl.constexpr):
    """Logits start, start + 1, ... of a row as (BLOCK_N / 8, 8), and their columns; -inf past the
    end of the row. The padding is loaded too: a mask that ends in the midst of 16 bytes, as for an
    odd V, would split every load into single elements.
    """
    offs_n = start + tl.arange(0, BLOCK_N // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    logits = tl.load(row_ptr + offs_n, mask=offs_n < padded_cols, other=0.0).to(ACC)
    return tl.where(offs_n < n_cols, logits, float("-inf")), offs_n


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_rows_kernel(
    logits_ptr,  # (rows, padded_cols), contiguous; if GRADIENT dlogits take their place
    targets_ptr,  # (rows)
    losses_ptr,  # (rows)
    padded_cols,
    n_cols,  # what lies behind is free memory
    ignore_index,
    label_smoothing,
    z_loss,
    SMOOTHED: tl.constexpr,  # label_smoothing is not 0
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * padded_cols
    target = tl.load(targets_ptr + row)
    valid = target != ignore_index
    is_class = (target >= 0) & (target < n_cols)
    at_target = tl.load(row_ptr + target, mask=is_class, other=0.0).to(ACC)

    # A running maximum and sum for every eight columns, which are one thread's: programs meet at a
    # barrier after the loop only.
    max_8 = tl.full([BLOCK_N // 8], float("-inf"), dtype=ACC)
    acc_exp = tl.zeros([BLOCK_N // 8], dtype=ACC)
    acc_logits = tl.zeros([BLOCK_N // 8], dtype=ACC)
    for start in range(0, n_cols, BLOCK_N):
        logits, offs_n = _load_tile(row_ptr, start, padded_cols, n_cols, ACC, BLOCK_N)
        new_max = tl.maximum(max_8, tl.max(logits, axis=1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # eight columns past the end
        exp = tl.exp2((logits - shift[:, None]) * 1.4426950408889634)
        acc_exp = acc_exp * tl.exp2((max_8 - shift) * 1.4426950408889634) + tl.sum(exp, axis=1)
        max_8 = new_max
        if SMOOTHED:
            acc_logits += tl.sum(tl.where(offs_n < n_cols, logits, 0.0), axis=1)
    row_max = tl.max(max_8, axis=0)
    sum_exp = tl.sum(acc_exp * tl.exp2((max_8 - row_max) * 1.4426950408889634), axis=0)

    # The maximum is subtracted before anything is added to it: logits of 1e4 lose no digits. A
    # target that is no class makes its row NaN, in the loss and in the gradients.
    log_sum = tl.where(is_class, tl.log(sum_exp), float("nan"))
    lse = row_max + log_sum
    loss = log_sum + (1.0 - label_smoothing) * (row_max - at_target) + z_loss * lse * lse
    if SMOOTHED:
        loss += label_smoothing * (row_max - tl.sum(acc_logits, axis=0) / n_cols)
    tl.store(losses_ptr + row, tl.where(valid, loss, 0.0))

    if GRADIENT:
        # An ignored row's is 0, even if its logits are not finite.
        shift = tl.where(valid, row_max, 0.0)
        share = tl.where(valid, (1.0 + 2.0 * z_loss * lse) / sum_exp, 0.0)
        at_target = tl.where(valid, 1.0 - label_smoothing, 0.0)
        elsewhere = tl.where(valid, label_smoothing / n_cols, 0.0)
        column = tl.where(is_class, target, -1).to(tl.int32)
        end = tl.where(valid, n_cols, 0)
        for start in range(0, n_cols, BLOCK_N):
            logits, offs_n = _load_tile(row_ptr, start, padded_cols, end, ACC, BLOCK_N)
            dlogits = tl.exp2((logits - shift) * 1.4426950408889634) * share
            dlogits -= tl.where(offs_n == column, at_target, 0.0)
            if SMOOTHED:
                dlogits -= elsewhere
            tl.store(
                row_ptr + offs_n,
                dlogits.to(logits_ptr.dtype.element_ty),
                mask=offs_n < padded_cols,
            )


# Chosen by ahead-of-time compilation (registers, no spill on sm_80, sm_90, sm_100), not yet
# measured: 8 elements a thread are one 16-byte load in half precision, and 4 rows of 512 threads
# fill a multiprocessor, while the rows under way (40 MB of GPT-2's in half precision) still fit
# into the L2 cache of sm_90.
MAX_BLOCK = 4096


def _launch(n_cols: int) -> dict[str, int]:
    block_n = max(256, min(MAX_BLOCK, triton.next_power_of_2(n_cols)))
    return dict(BLOCK_N=block_n, num_warps=block_n // 256)


def _rows(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    want_gradient: bool,
) -> None:
    n_rows, n_cols = logits.shape
    with _common.on_device(logits):
        _cross_entropy_rows_kernel[(n_rows,)](
            logits,
            targets,
            losses,
            logits.stride(0),
            n_cols,
            ignore_index,
            label_smoothing,
            z_loss,
            SMOOTHED=label_smoothing > 0.0,
            GRADIENT=want_gradient,
            ACC=_common.accumulator(logits.dtype),
            **_launch(n_cols),
        )


_linear_cross_entropy_op = chunked_loss.define("linear_cross_entropy", _rows)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of the logits ``x @ weight.T``, which are never stored whole: they exist for
    one chunk of rows at a time, and the gradients are computed along with the loss.

    Args:
        x: (..., C), any strides; float32, float16 or bfloat16, on a CUDA device.
        weight: (V, C), any V; of x's dtype or float32.
        targets: (...), int64 or int32, in [0, V) or equal to ``ignore_index``. Any other makes the
            loss NaN, and the gradients too.
        ignore_index: target of the rows that add neither to the loss nor to the gradients.
        reduction: "mean" over the rows that are not ignored (NaN if all are), or "sum".
        label_smoothing: share of the target distribution that is spread evenly over the V classes
            (Szegedy et al. 2016, arXiv:1512.00567), in [0, 1].
        z_loss: weight of the squared log-sum-exp that is added to a row's loss and keeps logits
            small (Chowdhery et al. 2022, arXiv:2204.02311), at least 0.

    Returns:
        A float32 scalar. The products are in x's dtype, under autocast in autocast's; log-sum-exp,
        losses and the sum for weight's gradient are in float32, and each gradient is rounded once
        more to its tensor's dtype. A gradient of these gradients is refused.

    Raises:
        TypeError: x or weight is no floating-point tensor, or targets no integer tensor.
        ValueError: shapes, dtypes or devices do not go together, or an option is out of its range.
    """
    _checks.linear_cross_entropy(x, weight, targets, reduction, label_smoothing, z_loss)
    _common.launchable(x=x, weight=weight)
    return chunked_loss.apply(
        _linear_cross_entropy_op,
        x,
        weight,
        targets,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
    )
