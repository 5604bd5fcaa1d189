"""The language-model head fused with its cross-entropy, without storing all logits: the Triton op.

See ``chunked_loss`` for the equations and the loop over chunks of rows, whose three matrix products
run in cuBLAS. The kernel here turns the logits of a chunk into losses and, in place, into dlogits.
Each program reads its row twice, the second time from the L2 cache (a row of GPT-2 is 100 KB in
half precision), and writes it once. It moves 2 s bytes per element and is memory-bound: on sm_90 it
issues 20 instructions per element (disassembly), and at 4.3 TB/s half precision has time for 27.

In fp8 mode the three products are of 8-bit matrices (``fp8_products.py``). The logits are still in
half precision; the kernel writes dlogits to a separate buffer as e5m2, 1 byte each. Their scale is
fixed: no dlogit is larger than 1. Multiplied by 2^15, they range from 2^15 down to e5m2's smallest
number, 2^-16, which stand for 1 to 2^-31. Bytes for M rows and V classes: 2 M V for the logits,
3 M V for the rows, 2 M V for the transpose that dweight needs, 1 M V each for dx and dweight. That
is 9 M V; half precision moves 10 M V.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _checks, _host, chunked_loss, configs, fp8_products
from fastgpt.kernels._device_math import rounded_quotient
from fastgpt.kernels._tensors import as_matrix


@triton.jit
def _load_tile(
    row_ptr, start, padded_cols, n_cols,
    AGAIN: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logits start, start + 1, ... of a row as (BLOCK_N / 8, 8), and their columns; -inf past the
    end of the row. The padding is loaded too: a mask that ends within 16 bytes, as with an odd V,
    would turn every load into loads of single elements. ``AGAIN``: keep them in the L2 cache."""
    offs_n = start + tl.arange(0, BLOCK_N // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    POLICY: tl.constexpr = "evict_last" if AGAIN else "evict_first"
    logits = tl.load(
        row_ptr + offs_n, mask=offs_n < padded_cols, other=0.0, eviction_policy=POLICY
    ).to(ACC)
    return tl.where(offs_n < n_cols, logits, float("-inf")), offs_n


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_rows_kernel(
    logits_ptr,  # (rows, padded_cols), contiguous
    dlogits_ptr,  # (rows, padded_cols), contiguous, written if GRADIENT; may be the logits
    targets_ptr,  # (rows)
    losses_ptr,  # (rows)
    padded_cols,
    n_cols,  # the padding after them may hold anything
    ignore_index,
    label_smoothing,
    z_loss,
    dlogits_scale,
    SMOOTHED: tl.constexpr,  # label_smoothing is not 0
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # STAGES - 1 tiles are loaded while one is computed
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * padded_cols
    target = tl.load(targets_ptr + row)
    valid = target != ignore_index
    is_class = (target >= 0) & (target < n_cols)
    at_target = tl.load(row_ptr + target, mask=is_class, other=0.0).to(ACC)

    # One running maximum and sum for every eight columns. One thread owns all eight, so threads
    # synchronise only after the loop.
    max_8 = tl.full([BLOCK_N // 8], float("-inf"), dtype=ACC)
    acc_exp = tl.zeros([BLOCK_N // 8], dtype=ACC)
    acc_logits = tl.zeros([BLOCK_N // 8], dtype=ACC)
    for start in tl.range(0, n_cols, BLOCK_N, num_stages=STAGES):
        logits, offs_n = _load_tile(row_ptr, start, padded_cols, n_cols, GRADIENT, ACC, BLOCK_N)
        new_max = tl.maximum(max_8, tl.max(logits, axis=1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # eight columns past the end
        exp = tl.exp2((logits - shift[:, None]) * 1.4426950408889634)
        acc_exp = acc_exp * tl.exp2((max_8 - shift) * 1.4426950408889634) + tl.sum(exp, axis=1)
        max_8 = new_max
        if SMOOTHED:
            acc_logits += tl.sum(tl.where(offs_n < n_cols, logits, 0.0), axis=1)
    row_max = tl.max(max_8, axis=0)
    sum_exp = tl.sum(acc_exp * tl.exp2((max_8 - row_max) * 1.4426950408889634), axis=0)

    # The maximum is subtracted first, so that logits of 1e4 lose no digits. A target outside of
    # [0, V) makes its row's loss and gradients NaN.
    log_sum = tl.where(is_class, tl.log(sum_exp), float("nan"))
    lse = row_max + log_sum
    loss = log_sum + (1.0 - label_smoothing) * (row_max - at_target) + z_loss * lse * lse
    if SMOOTHED:
        loss += label_smoothing * (row_max - tl.sum(acc_logits, axis=0) / n_cols)
    tl.store(losses_ptr + row, tl.where(valid, loss, 0.0))

    if GRADIENT:
        # The gradient of an ignored row is 0, even if its logits are not finite.
        shift = tl.where(valid, row_max, 0.0)
        share = tl.where(valid, (1.0 + 2.0 * z_loss * lse) / sum_exp, 0.0)
        at_target = tl.where(valid, 1.0 - label_smoothing, 0.0)
        elsewhere = tl.where(valid, label_smoothing / n_cols, 0.0)
        column = tl.where(is_class, target, -1).to(tl.int32)
        end = tl.where(valid, n_cols, 0)
        # Backwards from the end of the row, which was read last and is still in the cache.
        last = (n_cols - 1) // BLOCK_N * BLOCK_N
        for start in tl.range(0, n_cols, BLOCK_N, num_stages=STAGES):
            logits, offs_n = _load_tile(
                row_ptr, last - start, padded_cols, end, False, ACC, BLOCK_N
            )
            dlogits = tl.exp2((logits - shift) * 1.4426950408889634) * share
            dlogits -= tl.where(offs_n == column, at_target, 0.0)
            if SMOOTHED:
                dlogits -= elsewhere
            tl.store(
                dlogits_ptr + row * padded_cols + offs_n,
                (dlogits * dlogits_scale).to(dlogits_ptr.dtype.element_ty),
                mask=offs_n < padded_cols,
                eviction_policy="evict_first",
            )


@triton.jit
def _scaled_kernel(
    x_ptr,  # (n_elements)
    y_ptr,  # (n_elements)
    grad_ptr,  # (1)
    divisor_ptr,  # (1)
    n_elements,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    divisor = tl.maximum(tl.load(divisor_ptr).to(ACC), 1.0)  # the divisor is 0 if no row is valid
    factor = rounded_quotient(tl.load(grad_ptr).to(ACC), divisor)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
    tl.store(y_ptr + offs, (x * factor).to(y_ptr.dtype.element_ty), mask=mask)


def _scale(
    grad: Tensor,
    divisor: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dx_dtype: torch.dtype,
    dweight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See ``chunked_loss._scale``. PyTorch's product of two dtypes takes twice as long."""
    dx, dweight = dx.contiguous(), dweight.contiguous()
    gradients = torch.empty_like(dx, dtype=dx_dtype), torch.empty_like(dweight, dtype=dweight_dtype)
    config = configs.find(dx, "cross_entropy", "scale")
    with _host.on_device(dx):
        for x, y in zip((dx, dweight), gradients, strict=True):
            if x.numel():
                _scaled_kernel[(_host.cdiv(x.numel(), config.BLOCK),)](
                    x,
                    y,
                    grad,
                    divisor,
                    x.numel(),
                    ACC=_host.accumulator(x.dtype),
                    **configs.launch(config),
                )
    return gradients


_scale_op = chunked_loss.define_scale("linear_cross_entropy_bwd", _scale)


def _rows(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    want_gradient: bool,
    dlogits8: Tensor | None = None,
) -> None:
    """With ``dlogits8``, in the logits' layout, dlogits / ``_DLOGITS_SCALE`` are written there."""
    n_rows, n_cols = logits.shape
    size = max(256, _host.next_power_of_2(n_cols))
    config = configs.find(logits, "cross_entropy", "rows", size)
    with _host.on_device(logits):
        _cross_entropy_rows_kernel[(n_rows,)](
            logits,
            logits if dlogits8 is None else dlogits8,
            targets,
            losses,
            logits.stride(0),
            n_cols,
            ignore_index,
            label_smoothing,
            z_loss,
            1.0 if dlogits8 is None else 1.0 / _DLOGITS_SCALE,
            SMOOTHED=label_smoothing > 0.0,
            GRADIENT=want_gradient,
            ACC=_host.accumulator(logits.dtype),
            **configs.launch(config),
        )


_linear_cross_entropy_op = chunked_loss.define(
    "linear_cross_entropy", partial(chunked_loss.forward, _rows), _scale_op
)

_DLOGITS_SCALE = 2.0**-15

# Twice as many rows as in half precision: PyTorch's scaled products cannot accumulate, so each
# chunk's dweight is added in a separate pass. It moves 3 times dweight, 0.46 GB for GPT-2, in
# 0.11 ms on an H200, where the chunk's product takes 0.4 ms.
_FP8_CHUNKS = 2


def _fp8_chunk_rows(n_cols: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows per chunk: a multiple of 16, to which x's transpose is padded."""
    return max(16, _FP8_CHUNKS * chunked_loss.chunk_rows(n_cols, dtype, device))


def _forward_fp8(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    ignore_index: int,
    mean: bool,
    label_smoothing: float,
    z_loss: float,
    want_dx: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``chunked_loss.forward`` with products in fp8."""
    dx = x.new_empty(x.shape if want_dx else 0, dtype=dtype)
    x = as_matrix(x).to(dtype).contiguous()
    targets = targets.reshape(-1).contiguous()
    n_rows, n_cols = x.shape[0], weight.shape[0]
    x8 = fp8_products.quantise(x, columns=want_dweight)
    w8 = fp8_products.quantise(weight.contiguous(), columns=want_dx)
    scale = x.new_full((1,), _DLOGITS_SCALE, dtype=torch.float32)
    losses = x.new_empty(n_rows, dtype=torch.float32)
    dweight = x.new_zeros(weight.shape if want_dweight and not n_rows else 0, dtype=torch.float32)
    step = _fp8_chunk_rows(n_cols, dtype, x.device)
    want_gradient = want_dx or want_dweight
    for start in range(0, n_rows, step):
        chunk = slice(start, min(start + step, n_rows))
        logits = fp8_products.product(
            x8.rows[chunk], x8.scale, w8.rows, w8.scale, dtype, fast_sums=True
        )
        dlogits = torch.empty_like(logits, dtype=fp8_products.E5M2) if want_gradient else None
        _rows(
            logits, targets[chunk], losses[chunk], ignore_index, label_smoothing, z_loss,
            want_gradient, dlogits,
        )  # fmt: skip
        del logits  # before the next ones are allocated
        if dlogits is None:
            continue
        if w8.columns is not None:
            part = fp8_products.product(dlogits, scale, w8.columns, w8.scale, dtype)
            dx.view_as(x)[chunk] = part
        if x8.columns is not None:
            columns = fp8_products.transposed(dlogits)
            tokens = x8.columns[:, start : start + columns.shape[1]]
            part = fp8_products.product(columns, scale, tokens, x8.scale, torch.float32)
            dweight = part if start == 0 else dweight.add_(part)
    return *chunked_loss.reduced(losses, targets, ignore_index, mean), dx, dweight


_linear_cross_entropy_fp8_op = chunked_loss.define(
    "linear_cross_entropy_fp8", _forward_fp8, _scale_op
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    fp8: bool = False,
) -> Tensor:
    """Cross-entropy of the logits ``x @ weight.T``, which are never stored as a whole: only one
    chunk of rows exists at a time, and the gradients are computed together with the loss.

    Args:
        x: (..., C), any strides; float32, float16 or bfloat16, on a CUDA device.
        weight: (V, C), any V; of x's dtype or float32.
        targets: (...), int64 or int32, in [0, V) or equal to ``ignore_index``. Any other value
            makes the loss and the gradients NaN.
        ignore_index: rows with this target contribute neither to the loss nor to the gradients.
        reduction: "mean" over the rows that are not ignored (NaN if all are), or "sum".
        label_smoothing: share of the target distribution that is spread evenly over the V classes
            (Szegedy et al. 2016, arXiv:1512.00567), in [0, 1].
        z_loss: weight of the squared log-sum-exp, which is added to each row's loss to keep logits
            small (Chowdhery et al. 2022, arXiv:2204.02311), at least 0.
        fp8: multiply 8-bit matrices (``kernels.fp8_products``): x and weight in e4m3, dlogits in
            e5m2. Requires C and V to be multiples of 16, products in half precision, z_loss 0, and
            a GPU of compute capability 8.9 or newer.

    Returns:
        A float32 scalar. Products are in x's dtype, or autocast's under autocast. Log-sum-exp,
        losses and the accumulation of weight's gradient are in float32, and each gradient is
        rounded once more to its tensor's dtype. Double backward raises an error.

    Raises:
        TypeError: x or weight is not a floating-point tensor, or targets not an integer tensor.
        ValueError: shapes, dtypes or devices do not match, or an option is out of range.
    """
    _checks.linear_cross_entropy(
        x, weight, targets, ignore_index, reduction, label_smoothing, z_loss, fp8
    )
    _host.launchable(x=x, weight=weight)
    if fp8:
        _host.fp8_launchable(x, _host.autocast_dtype(x))
    return chunked_loss.apply(
        _linear_cross_entropy_fp8_op if fp8 else _linear_cross_entropy_op,
        x,
        weight,
        targets,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
    )
