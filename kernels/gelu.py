"""GELU (Hendrycks & Gimpel 2016): ``y = x * Phi(x)``, forward and backward.

    exact   y = x / 2 * (1 + erf(x / sqrt(2)))
    tanh    y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))

x and y have any shape. Saved for backward: x. Bytes moved at s bytes per element: 2s forward (x in,
y out), 3s backward (x and dy in, dx out). About 20 FLOPs per element, so both are memory-bound.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _checks, _host, configs
from fastgpt.kernels._device_math import gelu_slope, gelu_value
from fastgpt.kernels._operators import differentiable, fake, operator


@triton.jit
def _gelu_fwd_kernel(
    x_ptr,  # (n_elements)
    y_ptr,  # (n_elements)
    n_elements,
    TANH: tl.constexpr,
    FAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
    tl.store(y_ptr + offs, gelu_value(x, TANH, FAST).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_bwd_kernel(
    dy_ptr,  # (n_elements)
    x_ptr,  # (n_elements)
    dx_ptr,  # (n_elements)
    n_elements,
    TANH: tl.constexpr,
    FAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(ACC)
    dx = dy * gelu_slope(x, TANH, FAST)
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_bwd_rows_kernel(
    dy_ptr,  # (n_rows, n_cols), contiguous; overwritten by dx
    x_ptr,  # (n_rows, n_cols), contiguous
    y_ptr,  # (n_rows, n_cols), contiguous, written; or None
    sums_ptr,  # (1, row blocks, n_cols), written: sums of dx; or None
    n_rows,
    n_cols,
    TANH: tl.constexpr,
    FAST: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,  # rows per row block, a multiple of BLOCK_M
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # STAGES - 1 tiles are loaded while one is computed
):
    row_block = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_cols
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in tl.range(0, ROWS, BLOCK_M, num_stages=STAGES):
        offs_m = row_block * ROWS + start + tl.arange(0, BLOCK_M)
        mask = (offs_m < n_rows)[:, None] & mask_n[None, :]
        offs = offs_m.to(tl.int64)[:, None] * n_cols + offs_n[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(ACC)
        dx = dy * gelu_slope(x, TANH, FAST)
        acc += dx
        tl.store(dy_ptr + offs, dx.to(dy_ptr.dtype.element_ty), mask=mask)
        if y_ptr is not None:
            tl.store(y_ptr + offs, gelu_value(x, TANH, FAST).to(y_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        sums = tl.sum(acc, axis=0)
        tl.store(sums_ptr + row_block.to(tl.int64) * n_cols + offs_n, sums, mask=mask_n)


def _constexprs(x: Tensor, approximate: str) -> dict[str, Any]:
    fast, acc = _host.is_half(x.dtype), _host.accumulator(x.dtype)
    return dict(TANH=approximate == "tanh", FAST=fast, ACC=acc)


def _elementwise(kernel: Any, name: str, approximate: str, *inputs: Tensor) -> Tensor:
    """Launch an elementwise kernel; the last of ``inputs`` is x."""
    inputs = tuple(x.contiguous() for x in inputs)
    x = inputs[-1]
    out = torch.empty_like(x)
    if x.numel():
        config = configs.find(x, "gelu", name)
        with _host.on_device(x):
            kernel[(_host.cdiv(x.numel(), config.BLOCK),)](
                *inputs, out, x.numel(), **_constexprs(x, approximate), **configs.launch(config)
            )
    return out


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    return _elementwise(_gelu_fwd_kernel, "fwd", approximate, x)


def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    return _elementwise(_gelu_bwd_kernel, "bwd", approximate, dy, x)


def gelu_backward_rows_(
    dy: Tensor, x: Tensor, approximate: str, y: Tensor | None, sums: Tensor | None, rows: int
) -> None:
    """Overwrite dy (M, N), contiguous like x, with dx. Also write GELU's result to ``y`` (M, N) and
    the sums of every ``rows`` rows of dx to ``sums`` (1, ceil(M / rows), N), unless None."""
    n_rows, n_cols = x.shape
    config = configs.find(x, "gelu", "bwd_rows")
    grid = _host.cdiv(n_rows, rows), _host.cdiv(n_cols, config.BLOCK_N)
    with _host.on_device(x):
        _gelu_bwd_rows_kernel[grid](
            dy,
            x,
            y,
            sums,
            n_rows,
            n_cols,
            ROWS=rows,
            **_constexprs(x, approximate),
            **configs.launch(config),
        )


_gelu_op = operator("gelu")(gelu_forward)
_gelu_bwd_op = operator("gelu_bwd")(gelu_backward)


@fake(_gelu_op)
def _(x, approximate):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@fake(_gelu_bwd_op)
def _(dy, x, approximate):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    (x,) = ctx.saved_tensors
    return (_gelu_bwd_op(dy, x, ctx.approximate),)


differentiable(_gelu_op, _backward, _setup_context)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    Args:
        x: any shape and strides; float32, float16 or bfloat16, on a CUDA device.
        approximate: "none" for the exact erf form (nanoGPT's), "tanh" for the form GPT-2 was
            trained with. They differ by up to 5e-4.

    Returns:
        A contiguous tensor with the shape and dtype of x, computed in float32.

    Raises:
        TypeError: x is not a floating-point tensor, or has an unsupported dtype.
        ValueError: x is not on a CUDA device, or ``approximate`` is neither of the two.
    """
    _checks.gelu(x, approximate)
    _host.launchable(x=x)
    return _gelu_op(x, approximate)
