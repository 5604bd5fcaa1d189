"""The language-model head and its cross-entropy without stored logits: the Triton op.

``chunked_loss`` has the equations and the loop over chunks of rows, whose three matrix products
are cuBLAS's. The one kernel here turns the logits of a chunk into losses and, in place, into
dlogits. A program has one row: it reads it twice, the second time from the L2 cache (100 KB a row
of GPT-2's in half precision), and writes it once, so that memory bounds it: 2 s bytes an element,
two exponentials and about ten other operations.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _checks, _common, chunked_loss


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_rows_kernel(
    logits_ptr,  # (rows, n_cols), columns adjacent; dlogits on return if GRADIENT
    logits_stride_row,
    targets_ptr,  # (rows)
    losses_ptr,  # (rows)
    n_cols,
    ignore_index,
    label_smoothing,
    z_loss,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride_row
    offs_n = tl.arange(0, BLOCK_N)
    target = tl.load(targets_ptr + row).to(tl.int64)
    known = (target >= 0) & (target < n_cols)
    at_target = tl.load(logits_ptr + target, mask=known, other=0.0).to(ACC)

    row_max = tl.full([], float("-inf"), dtype=ACC)
    sum_exp = tl.full([], 0.0, dtype=ACC)
    acc_sum = tl.zeros([BLOCK_N], dtype=ACC)
    for start in range(0, n_cols, BLOCK_N):
        mask = offs_n < n_cols - start
        logits = tl.load(logits_ptr + start + offs_n, mask=mask, other=float("-inf")).to(ACC)
        new_max = tl.maximum(row_max, tl.max(logits, axis=0))
        sum_exp = sum_exp * tl.exp(row_max - new_max) + tl.sum(tl.exp(logits - new_max), axis=0)
        row_max = new_max
        acc_sum += tl.where(mask, logits, 0.0)

    lse = row_max + tl.log(sum_exp)
    lse = tl.where(known, lse, float("nan"))  # an unknown target shows in loss and gradients
    valid = target != ignore_index
    loss = lse - (1.0 - label_smoothing) * at_target + z_loss * lse * lse
    loss -= label_smoothing * (tl.sum(acc_sum, axis=0) / n_cols)
    tl.store(losses_ptr + row, tl.where(valid, loss, 0.0))

    if GRADIENT:
        share = 1.0 + 2.0 * z_loss * lse
        for start in range(0, n_cols, BLOCK_N):
            mask = offs_n < n_cols - start
            logits_ptrs = logits_ptr + start + offs_n
            logits = tl.load(logits_ptrs, mask=mask, other=float("-inf")).to(ACC)
            dlogits = tl.exp(logits - lse) * share - label_smoothing / n_cols
            dlogits -= tl.where(offs_n == target - start, 1.0 - label_smoothing, 0.0)
            dlogits = tl.where(valid, dlogits, 0.0).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptrs, dlogits, mask=mask)


# Chosen by ahead-of-time compilation (registers, no spill on sm_80, sm_90, sm_100), not yet
# measured: 8 elements a thread are one 16-byte load in half precision, and with 1024 threads a row
# at most two rows a multiprocessor are under way, which the L2 cache holds for their second read.
MAX_BLOCK = 8192


def _launch(n_cols: int) -> dict[str, int]:
    block_n = min(MAX_BLOCK, max(32, triton.next_power_of_2(n_cols)))
    return dict(BLOCK_N=block_n, num_warps=max(1, block_n // 256))


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
            logits.stride(0),
            targets,
            losses,
            n_cols,
            ignore_index,
            label_smoothing,
            z_loss,
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
