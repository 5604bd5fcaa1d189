"""LayerNorm (Ba et al. 2016): host functions, operator and public function.

The host functions also serve ``residual_layer_norm``. The equations, what is saved, bytes and FLOPs
stand in ``layer_norm_kernels.py``.
"""

import torch
import triton
from torch import Tensor

from fastgpt.kernels import _checks, _host, configs
from fastgpt.kernels.layer_norm_kernels import (
    _layer_norm_bwd_kernel,
    _layer_norm_bwd_means_kernel,
    _layer_norm_fwd_kernel,
    _sum_bands_kernel,
)

MAX_WIDTH = 16384

# A tile of the backward also keeps the sums of the parameters' gradients. Past MAX_FUSED_WIDTH they
# no longer fit into the registers beside a whole row: a kernel of its own finds the means of a row,
# and the tiles are narrow.
MAX_FUSED_WIDTH = 4096


def _whole_rows(x: Tensor, kernel: str) -> dict[str, int]:
    """The launch of a kernel whose tile is as wide as x's rows."""
    block_n = max(32, triton.next_power_of_2(x.shape[-1]))
    return dict(BLOCK_N=block_n, **configs.launch(configs.find(x, "layer_norm", kernel, block_n)))


# --------------------------------------------------------------------------------- host functions


def statistic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> Tensor:
    """(..., N) → (M, N) with adjacent columns; copied only where no view can say it, or where the
    distances inside a tile may pass 2^31."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) < 2**26 else rows.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def layer_norm_fwd(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    delta_bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    stream: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """y and, if there is a delta, total, both with the shape of x, contiguous; mean, rstd (M)."""
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    total = None if delta is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, delta_rows = _rows(x), None if delta is None else _rows(delta)
    n_rows, n_cols = rows.shape
    mean = torch.empty(n_rows, dtype=statistic(x), device=x.device)
    rstd = torch.empty_like(mean)
    threshold, keep_scale = _host.dropout_numbers(dropout_p)
    if n_rows:
        launch = _whole_rows(x, "fwd")
        with _host.on_device(x):
            _layer_norm_fwd_kernel[(triton.cdiv(n_rows, launch["BLOCK_M"]),)](
                rows,
                rows.stride(0),
                delta_rows,
                0 if delta_rows is None else delta_rows.stride(0),
                _contiguous(delta_bias),
                total,
                weight.contiguous(),
                _contiguous(bias),
                y,
                mean,
                rstd,
                seed,
                stream,
                n_rows,
                n_cols,
                eps,
                threshold,
                keep_scale,
                DROPOUT=threshold > 0,
                ACC=_host.accumulator(x.dtype),
                **launch,
                **_host.FMA,
            )
    return y, total, mean, rstd


def layer_norm_bwd(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    stream: int,
    dx: Tensor,
    ddelta: Tensor | None,
    dweight: Tensor,
    dbias: Tensor | None,
    ddelta_bias: Tensor | None,
) -> None:
    """Writes the contiguous dx (or dresidual), dweight and those that are not None of ddelta, which
    is else equal to dx, dbias and ddelta_bias. ``x``: the plain op's x, or total."""
    rows, dy, dtotal = _rows(x), dy.contiguous(), _contiguous(dtotal)
    n_rows, n_cols = rows.shape
    params = [p for p in (dweight, dbias, ddelta_bias) if p is not None]
    if n_rows == 0:
        for p in params:
            p.zero_()
        return

    row_launch = _whole_rows(x, "bwd")
    fused = n_cols <= MAX_FUSED_WIDTH
    launch = row_launch
    if not fused:
        launch = configs.launch(configs.find(x, "layer_norm", "bwd_narrow"))
    sums = configs.launch(configs.find(x, "layer_norm", "sum_bands"))
    tiles = triton.cdiv(n_rows, launch["BLOCK_M"])
    resident = 3 if dropout_p else 4  # of a multiprocessor's registers, at 768 columns in bfloat16
    programs = min(resident * _host.multiprocessors(x.device), tiles)
    rows_per_program = triton.cdiv(tiles, programs) * launch["BLOCK_M"]
    programs = triton.cdiv(n_rows, rows_per_program)
    partial = torch.empty(len(params), programs, n_cols, dtype=mean.dtype, device=x.device)
    threshold, keep_scale = _host.dropout_numbers(dropout_p)
    acc = _host.accumulator(x.dtype)
    inputs = rows, rows.stride(0), weight.contiguous(), mean, rstd
    means = None if fused else torch.empty(2, n_rows, dtype=mean.dtype, device=x.device)
    with _host.on_device(x):
        if not fused:
            _layer_norm_bwd_means_kernel[(triton.cdiv(n_rows, row_launch["BLOCK_M"]),)](
                dy, *inputs, means, n_rows, n_cols, ACC=acc, **row_launch, **_host.FMA
            )
        _layer_norm_bwd_kernel[(programs, triton.cdiv(n_cols, launch["BLOCK_N"]))](
            dy,
            dtotal,
            *inputs,
            means,
            dx,
            ddelta,
            partial,
            seed,
            stream,
            n_rows,
            n_cols,
            rows_per_program,
            threshold,
            keep_scale,
            HAS_BIAS=dbias is not None,
            HAS_DELTA_BIAS=ddelta_bias is not None,
            DROPOUT=threshold > 0,
            ACC=acc,
            **launch,
            **_host.FMA,
        )
        _sum_bands_kernel[(triton.cdiv(n_cols, sums["BLOCK_N"]), len(params))](
            partial,
            *params,
            *[None] * (3 - len(params)),
            programs,
            n_cols,
            ACC=acc,
            **sums,
            **_host.FMA,
        )


@torch.library.custom_op("fastgpt::layer_norm", mutates_args=())
def _layer_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y with the shape of x, contiguous; mean and rstd (M)."""
    y, _, mean, rstd = layer_norm_fwd(x, None, weight, bias, None, None, eps, 0.0, 0, out_dtype)
    return y, mean, rstd


def _gradients(x: Tensor, weight: Tensor, has_bias: bool) -> list[Tensor]:
    """Memory for dx, dweight and, if there is a bias, dbias."""
    params = [weight.new_empty(weight.shape) for _ in range(1 + has_bias)]
    return [x.new_empty(x.shape), *params]


@torch.library.custom_op("fastgpt::layer_norm_bwd", mutates_args=())
def _layer_norm_bwd_op(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> list[Tensor]:
    dx, dweight, *dbias = gradients = _gradients(x, weight, has_bias)
    layer_norm_bwd(
        dy, None, x, weight, mean, rstd, None, 0.0, 0,
        dx, None, dweight, dbias[0] if has_bias else None, None,
    )  # fmt: skip
    return gradients


@_layer_norm_op.register_fake
def _(x, weight, bias, eps, out_dtype):
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=statistic(x))
    return x.new_empty(x.shape, dtype=out_dtype), mean, torch.empty_like(mean)


@_layer_norm_bwd_op.register_fake
def _(dy, x, weight, mean, rstd, has_bias):
    return _gradients(x, weight, has_bias)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)  # no zeros for mean and rstd


def _backward(ctx, dy, _dmean, _drstd):
    if dy is None:
        return (*[None] * 5,)
    dx, dweight, *dbias = _layer_norm_bwd_op(dy, *ctx.saved_tensors, ctx.has_bias)
    return dx, dweight, dbias[0] if ctx.has_bias else None, None, None


_layer_norm_op.register_autograd(_backward, setup_context=_setup_context)


def check_width(name: str, x: Tensor) -> None:
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"{name} must have a last dimension of at most {MAX_WIDTH}, got {x.shape[-1]}"
        )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: (..., N), any strides, N up to 16,384; float32, float16 or bfloat16, on a CUDA device.
        weight: (N,), of x's dtype or float32.
        bias: (N,), of weight's dtype, or None.
        eps: added to the variance, at least 0.

    Returns:
        A contiguous tensor with the shape of x. Its dtype is x's; under autocast it is autocast's,
        since the Linear behind a LayerNorm would round it so in a pass of its own. Statistics and
        sums are float32.

    Raises:
        TypeError: x, weight or bias is no floating-point tensor, or of another dtype.
        ValueError: shapes, dtypes or devices do not go together, N > 16,384, or eps < 0.
    """
    _checks.layer_norm(x, weight, bias, eps)
    _host.launchable(x=x, weight=weight, bias=bias)
    check_width("x", x)
    return _layer_norm_op(x, weight, bias, eps, _host.autocast_dtype(x))[0]
