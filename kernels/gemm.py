"""Matrix products with an epilogue for ``linear`` and ``mlp``: launchers.

See ``gemm_kernels.py`` for the equations. If ``configs`` has a tile for a product, the Triton
kernel computes it; otherwise cuBLAS does, and the epilogue is a separate kernel.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels import _host, configs
from fastgpt.kernels.configs import Gemm
from fastgpt.kernels.gelu import gelu_backward_rows_, gelu_forward
from fastgpt.kernels.gemm_kernels import _linear_gelu_kernel, _weight_grad_kernel
from fastgpt.kernels.partial_sums import sum_row_blocks

# FLOPs in the time that moving one byte takes: 788 TFLOP/s over 4.3 TB/s, measured on an H200; 150
# on an A100, 280 on a B200. Used to choose the number of splits.
_FLOPS_PER_BYTE = 183
_MAX_SPLITS = 32
_MIN_TOKENS = 256  # per split: with fewer, the pass over dW costs more than it saves
ROWS = 64  # a separate epilogue kernel writes one row of partial sums for this many rows


def _tma(device: torch.device) -> bool:
    """Whether TMA copies the tiles. The interpreter supports descriptors too."""
    capability = _host.capability(device)
    return capability is None or 90 <= capability < 120


def _config(kernel: str, *matrices: Tensor, options: tuple[str, ...] = ()) -> Gemm | None:
    """The tile for these matrices, or None if cuBLAS computes the product: if ``configs`` says so;
    if rows are not aligned to 16 bytes, which TMA and cp.async require; or if a tensor descriptor
    would reject the strides, as for a single row or column."""
    for x in matrices:
        if x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16:
            return None
        if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
            return None
    size = _host.next_power_of_2(max(matrices[0].shape[1], matrices[1].shape[1]))
    config = configs.find(matrices[0], "gemm", kernel, size, *options)
    return None if config == configs.CUBLAS else config


def _matrix(x: Tensor, block_rows: int, block_cols: int) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [block_rows, block_cols]) if _tma(x.device) else x


def _constexprs(x: Tensor, config: Gemm) -> dict:
    return dict(
        TMA=_tma(x.device),
        PRECISION=_host.dot_precision(x.dtype),
        ACC=_host.accumulator(x.dtype),
        **configs.launch(config),
    )


def _linear_gelu(
    config: Gemm,
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    dpre: Tensor | None,
    act: Tensor | None,
    approximate: str,
) -> None:
    """Write pre, or dpre if given, and act if given. ``bias``: with dpre, this is an output, the
    sums of dpre for each row of tiles (rows of tiles, N)."""
    gradient = dpre is not None
    block_m, block_n, block_k = config[:3]
    (n_rows, n_inner), n_cols = a.shape, pre.shape[1]
    n_tiles = _host.cdiv(n_rows, block_m) * _host.cdiv(n_cols, block_n)
    n_programs = min(n_tiles, config.programs * _host.multiprocessors(a.device))
    half = block_m, block_n // 2  # the epilogue's block
    with _host.on_device(a):
        _linear_gelu_kernel[(n_programs,)](
            _matrix(a, block_m, block_k),
            a.stride(0),
            _matrix(w, block_k, block_n) if gradient else _matrix(w, block_n, block_k),
            w.stride(0),
            None if bias is None else bias.contiguous(),
            _matrix(pre, *half),
            None if dpre is None else _matrix(dpre, *half),
            None if act is None else _matrix(act, *half),
            n_rows,
            n_cols,
            n_inner,
            GRADIENT=gradient,
            HAS_BIAS=bias is not None,
            HAS_ACT=act is not None,
            TANH=approximate == "tanh",
            FAST=_host.is_half(a.dtype),
            **_constexprs(a, config),
        )


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    """x (M, K), weight (N, K) → ``pre = x weightᵀ + bias`` and ``gelu(pre)``, both (M, N)."""
    pre = x.new_empty(x.shape[0], weight.shape[0])
    config = _config("fwd", x, weight, pre) if x.numel() and pre.numel() else None
    if config is None:
        pre = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return pre, gelu_forward(pre, approximate)
    act = torch.empty_like(pre)
    _linear_gelu(config, x, weight, bias, pre, None, act, approximate)
    return pre, act


def linear_gelu_gradient(
    dy: Tensor,
    weight: Tensor,
    pre: Tensor,
    approximate: str,
    *,
    recompute: bool,
    dbias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy (M, K), weight (K, N), pre (M, N) → ``dpre = (dy weight) * gelu'(pre)`` (M, N); if
    ``recompute``, ``gelu(pre)`` (M, N); with ``dbias_dtype`` the sum of dpre over M (N)."""
    pre = pre.contiguous()  # saved-tensor hooks may have changed its strides
    options = ("recompute",) if recompute else ()
    not_empty = dy.numel() and pre.numel()
    config = _config("bwd", dy, weight, pre, options=options) if not_empty else None
    dpre = dy @ weight if config is None else torch.empty_like(pre)
    act = torch.empty_like(pre) if recompute else None
    dbias = parts = None
    if dbias_dtype is not None:
        dbias = pre.new_empty(pre.shape[1], dtype=dbias_dtype)
        n_parts = _host.cdiv(pre.shape[0], ROWS if config is None else config.BLOCK_M)
        parts = pre.new_empty(1, n_parts, pre.shape[1], dtype=_host.stats_dtype(pre.dtype))
    if config is None:
        gelu_backward_rows_(dpre, pre, approximate, act, parts, ROWS)
    else:
        _linear_gelu(config, dy, weight, parts, pre, dpre, act, approximate)
    if parts is not None and dbias is not None:
        sum_row_blocks(parts, [dbias], configs.find(dy, "gemm", "sum_tiles"))
    return dpre, act, dbias


@functools.cache
def splits(n_rows: int, n_cols: int, n_tokens: int, n_tiles: int, slots: int) -> int:
    """The number of splits of the sum over tokens. Each costs a pass over dW in float32, but with
    too few, multiprocessors idle in the last wave of tiles."""

    def cost(n: int) -> float:  # in bytes of device memory
        waves = math.ceil(n_tiles * n / slots)
        busy = 2 * n_rows * n_cols * n_tokens / _FLOPS_PER_BYTE
        return busy * waves * slots / (n_tiles * n) + (8 * n * n_rows * n_cols if n > 1 else 0)

    most = max(1, min(_MAX_SPLITS, n_tokens // _MIN_TOKENS))
    return min(range(1, most + 1), key=cost)


def weight_gradient(
    dy: Tensor, x: Tensor, has_bias: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """dy (T, M), x (T, N) → ``dyᵀ x`` (M, N) and, if ``has_bias``, the sum of dy over T (M), both
    of ``dtype``, summed in float32."""
    (n_tokens, n_rows), n_cols = dy.shape, x.shape[1]
    options = ("bias",) if has_bias else ()
    config = _config("weight", dy, x, options=options) if dy.numel() and x.numel() else None
    if config is None:
        dweight = _host.matmul_float32(dy.t(), x).to(dtype)
        return dweight, dy.sum(0, dtype=_host.stats_dtype(dy.dtype)).to(dtype) if has_bias else None
    block_m, block_n, block_k = config[:3]
    n_tiles = _host.cdiv(n_rows, block_m) * _host.cdiv(n_cols, block_n)
    slots = config.programs * _host.multiprocessors(dy.device)
    n_splits = splits(n_rows, n_cols, n_tokens, n_tiles, slots)
    tokens_per_split = _host.cdiv(_host.cdiv(n_tokens, n_splits), block_k) * block_k
    n_splits = _host.cdiv(n_tokens, tokens_per_split)
    outs = [dy.new_empty(n_rows, n_cols, dtype=dtype)]
    if has_bias:
        outs.append(dy.new_empty(n_rows, dtype=dtype))
    parts = outs
    if n_splits > 1:
        wide = _host.stats_dtype(dy.dtype)
        parts = [out.new_empty(1, n_splits, *out.shape, dtype=wide) for out in outs]
    with _host.on_device(dy):
        _weight_grad_kernel[(n_tiles, n_splits)](
            _matrix(dy, block_k, block_m),
            dy.stride(0),
            _matrix(x, block_k, block_n),
            x.stride(0),
            parts[0],
            parts[1] if has_bias else None,
            n_tokens,
            n_rows,
            n_cols,
            tokens_per_split,
            HAS_BIAS=has_bias,
            **_constexprs(dy, config),
        )
    if n_splits > 1:
        for part, out in zip(parts, outs, strict=True):
            sum_row_blocks(part, [out], configs.find(dy, "gemm", "sum_parts"))
    return outs[0], outs[1] if has_bias else None
