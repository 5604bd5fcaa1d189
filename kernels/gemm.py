"""Matrix products with an epilogue: host functions for ``linear`` and ``mlp``.

The equations stand in ``gemm_kernels.py``. Where ``configs`` names a tile for a product, the Triton
kernel computes it, else cuBLAS, with the epilogue as a kernel of its own.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels import _host, configs
from fastgpt.kernels.configs import Gemm
from fastgpt.kernels.gelu import gelu_backward, gelu_forward
from fastgpt.kernels.gemm_kernels import _linear_gelu_kernel, _weight_grad_kernel

# FLOPs in the time of one byte of device memory: 788 TFLOP/s over 4.3 TB/s, measured on an H200; an
# A100 has 150, a B200 280. Used to choose the number of splits.
_FLOPS_PER_BYTE = 183
_MAX_SPLITS = 32
_MIN_TOKENS = 256  # in a part: for fewer, the pass over dW costs more than it saves


def _tma(device: torch.device) -> bool:
    """Whether tiles come by TMA. The interpreter knows descriptors too."""
    capability = _host.capability(device)
    return capability is None or 90 <= capability < 120


def _config(kernel: str, *matrices: Tensor, recompute: bool = False) -> Gemm | None:
    """The tile for these matrices; None where cuBLAS computes the product: because ``configs`` says
    so; for rows that do not begin at multiples of 16 bytes, which neither TMA nor cp.async copies;
    and for a single row or column whose strides a tensor descriptor refuses.
    """
    for x in matrices:
        if x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16:
            return None
        if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
            return None
    options = ("recompute",) if recompute else ()
    config = configs.find(matrices[0], "gemm", kernel, configs.ANY, *options)
    return None if config == configs.CUBLAS else config


def _matrix(x: Tensor, block_rows: int, block_cols: int) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [block_rows, block_cols]) if _tma(x.device) else x


def _constexprs(x: Tensor, config: Gemm) -> dict:
    return dict(
        TMA=_tma(x.device),
        PRECISION=_host.dot_precision(x.dtype),
        ACC=_host.accumulator(x.dtype),
        **configs.launch(config),
        **_host.FMA,
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
    """Writes pre, or dpre if it is given, and act if it is given."""
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
    config = _config("fwd", x, weight, pre) if x.numel() else None
    if config is None:
        pre = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return pre, gelu_forward(pre, approximate)
    act = torch.empty_like(pre)
    _linear_gelu(config, x, weight, bias, pre, None, act, approximate)
    return pre, act


def linear_gelu_gradient(
    dy: Tensor, weight: Tensor, pre: Tensor, approximate: str, recompute: bool
) -> tuple[Tensor, Tensor | None]:
    """dy (M, K), weight (K, N), pre (M, N) → ``(dy weight) * gelu'(pre)`` and, if ``recompute``,
    ``gelu(pre)``, both (M, N)."""
    config = _config("bwd", dy, weight, pre, recompute=recompute) if dy.numel() else None
    if config is None:
        dpre = gelu_backward(dy @ weight, pre, approximate)
        return dpre, gelu_forward(pre, approximate) if recompute else None
    dpre = torch.empty_like(pre)
    act = torch.empty_like(pre) if recompute else None
    _linear_gelu(config, dy, weight, None, pre, dpre, act, approximate)
    return dpre, act


@functools.cache
def splits(n_rows: int, n_cols: int, n_tokens: int, n_tiles: int, slots: int) -> int:
    """Into how many parts the sum over the tokens is split: each part costs a pass over dW in
    float32, and with too few, multiprocessors idle in the last wave of tiles."""

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
    config = _config("weight", dy, x) if n_tokens and n_rows and n_cols else None
    acc_dtype = torch.promote_types(dy.dtype, torch.float32)
    if config is None:
        dweight = _host.matmul_float32(dy.t(), x).to(dtype)
        return dweight, dy.sum(0, dtype=acc_dtype).to(dtype) if has_bias else None
    block_m, block_n, block_k = config[:3]
    n_tiles = _host.cdiv(n_rows, block_m) * _host.cdiv(n_cols, block_n)
    slots = config.programs * _host.multiprocessors(dy.device)
    n_splits = splits(n_rows, n_cols, n_tokens, n_tiles, slots)
    tokens_per_split = _host.cdiv(_host.cdiv(n_tokens, n_splits), block_k) * block_k
    n_splits = _host.cdiv(n_tokens, tokens_per_split)
    dweight = dy.new_empty(n_splits, n_rows, n_cols, dtype=acc_dtype)
    dbias = dy.new_empty(n_splits, n_rows, dtype=acc_dtype) if has_bias else None
    with _host.on_device(dy):
        _weight_grad_kernel[(n_tiles, n_splits)](
            _matrix(dy, block_k, block_m),
            dy.stride(0),
            _matrix(x, block_k, block_n),
            x.stride(0),
            dweight,
            dbias,
            n_tokens,
            n_rows,
            n_cols,
            tokens_per_split,
            HAS_BIAS=has_bias,
            **_constexprs(dy, config),
        )
    if n_splits == 1:
        return dweight[0].to(dtype), None if dbias is None else dbias[0].to(dtype)
    return dweight.sum(0).to(dtype), None if dbias is None else dbias.sum(0).to(dtype)
