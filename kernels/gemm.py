"""Matrix products with an epilogue: launch tables and host functions for ``linear`` and ``mlp``.

The equations stand in ``gemm_kernels.py``. Each product is taken by the Triton kernel where the
tables have tiles for it, else by cuBLAS with the epilogue as a kernel of its own.
"""

import functools
import math

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels import _host
from fastgpt.kernels.costs import KernelCost, nbytes
from fastgpt.kernels.gelu import gelu_backward, gelu_forward
from fastgpt.kernels.gemm_kernels import _linear_gelu_kernel, _weight_grad_kernel

# The launch tables: kernel → (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages, programs that fit
# on a multiprocessor), or None for cuBLAS. Chosen by ahead-of-time compilation: no spill, and at
# least two programs side by side, so that one computes its epilogue while the other multiplies.
# Of 4 and 8 warps, those that issue fewer instructions a tile: on sm_90 and K = 768, 4100 to 4200
# cycles beside 6144 of the tensor cores with 4, 5400 to 5500 with 8. Predicted, not measured.
Tile = tuple[int, int, int, int, int, int]
_Tiles = dict[str, Tile | None]

# sm_90 and sm_100: tiles come by TMA. "bwd_recompute" writes the activation too.
TMA_TILES: _Tiles = {
    "fwd": (128, 128, 64, 4, 3, 2),
    "bwd": (128, 128, 64, 4, 3, 2),
    "bwd_recompute": (128, 64, 64, 4, 4, 2),
    "weight": (128, 128, 64, 4, 3, 2),
}

# Elsewhere (sm_80, sm_86, sm_89, sm_120): by cp.async, and accumulators live in registers.
POINTER_TILES: _Tiles = {
    "fwd": (64, 128, 32, 4, 3, 3),
    "bwd": (64, 128, 32, 4, 3, 3),
    "bwd_recompute": (128, 64, 32, 4, 3, 3),
    "weight": (128, 128, 32, 8, 3, 2),
}

# The interpreter pays by the operation, not by the register.
INTERPRETER_TILES: _Tiles = dict.fromkeys(TMA_TILES, (64, 64, 64, 4, 1, 1))

_GROUP = 8  # tiles down before the next column

# Operations that take as long as one byte of device memory: 788 TFLOP/s over 4.3 TB/s, measured on
# an H200; an A100 has 150, a B200 280. Only the number of splits depends on it.
_FLOPS_PER_BYTE = 183
_MAX_SPLITS = 32
_MIN_TOKENS = 256  # in a part: fewer do not pay for the pass over dW


def _tma(device: torch.device) -> bool:
    """Whether tiles come by TMA. The interpreter knows descriptors too."""
    capability = _host.capability(device)
    return capability is None or 90 <= capability < 120


def tiles(device: torch.device) -> _Tiles:
    """The launch table for the device."""
    if _host.capability(device) is None:
        return INTERPRETER_TILES
    return TMA_TILES if _tma(device) else POINTER_TILES


def _tile(kernel: str, *matrices: Tensor) -> Tile | None:
    """The table's line for the kernel on these matrices, whose columns are adjacent; None where
    cuBLAS is taken instead: if the table says so; for float32 (its TF32 kernels are as good as
    ours, and IEEE products leave no epilogue to hide); for rows that do not begin at multiples
    of 16 bytes, which neither TMA nor cp.async can copy; and where a single row or column has
    strides that a tensor descriptor refuses.
    """
    for x in matrices:
        if x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16:
            return None
        if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
            return None
    x = matrices[0]
    if _host.capability(x.device) is not None and not _host.is_half(x.dtype):
        return None
    return tiles(x.device)[kernel]


def _matrix(x: Tensor, block_rows: int, block_cols: int) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [block_rows, block_cols]) if _tma(x.device) else x


def _settings(x: Tensor, tile: Tile) -> dict:
    block_m, block_n, block_k, num_warps, num_stages, _ = tile
    return dict(
        TMA=_tma(x.device),
        PRECISION=_host.dot_precision(x.dtype),
        ACC=_host.accumulator(x.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP=_GROUP,
        num_warps=num_warps,
        num_stages=num_stages,
        **_host.FMA,
    )


def _linear_gelu(
    tile: Tile,
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    dpre: Tensor | None,
    act: Tensor | None,
    approximate: str,
) -> None:
    """Fills pre, or dpre if that is asked for, and act if that is."""
    gradient = dpre is not None
    block_m, block_n, block_k, *_, per_multiprocessor = tile
    (n_rows, n_inner), n_cols = a.shape, pre.shape[1]
    n_tiles = triton.cdiv(n_rows, block_m) * triton.cdiv(n_cols, block_n)
    n_programs = min(n_tiles, per_multiprocessor * _host.multiprocessors(a.device))
    half = block_m, block_n // 2  # what the epilogue works on
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
            **_settings(a, tile),
        )


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    """x (M, K), weight (N, K) → ``pre = x weightᵀ + bias`` and ``gelu(pre)``, both (M, N)."""
    pre = x.new_empty(x.shape[0], weight.shape[0])
    tile = _tile("fwd", x, weight, pre) if x.numel() else None
    if tile is None:
        pre = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return pre, gelu_forward(pre, approximate)
    act = torch.empty_like(pre)
    _linear_gelu(tile, x, weight, bias, pre, None, act, approximate)
    return pre, act


def linear_gelu_gradient(
    dy: Tensor, weight: Tensor, pre: Tensor, approximate: str, recompute: bool
) -> tuple[Tensor, Tensor | None]:
    """dy (M, K), weight (K, N), pre (M, N) → ``(dy weight) * gelu'(pre)`` and, if ``recompute``,
    ``gelu(pre)``, both (M, N)."""
    tile = _tile("bwd_recompute" if recompute else "bwd", dy, weight, pre) if dy.numel() else None
    if tile is None:
        dpre = gelu_backward(dy @ weight, pre, approximate)
        return dpre, gelu_forward(pre, approximate) if recompute else None
    dpre = torch.empty_like(pre)
    act = torch.empty_like(pre) if recompute else None
    _linear_gelu(tile, dy, weight, None, pre, dpre, act, approximate)
    return dpre, act


@functools.cache
def splits(n_rows: int, n_cols: int, n_tokens: int, n_tiles: int, slots: int) -> int:
    """Into how many parts the sum over the tokens is cut. Every part costs a pass over dW in
    float32; too few leave multiprocessors idle in the last wave of tiles."""

    def cost(n: int) -> float:  # in bytes of device memory
        waves = math.ceil(n_tiles * n / slots)
        busy = 2 * n_rows * n_cols * n_tokens / _FLOPS_PER_BYTE
        return busy * waves * slots / (n_tiles * n) + (8 * n * n_rows * n_cols if n > 1 else 0)

    most = max(1, min(_MAX_SPLITS, n_tokens // _MIN_TOKENS))
    return min(range(1, most + 1), key=cost)


# Cost formulas: as on an H100 or H200, which have 132 multiprocessors; shapes and dtypes are all
# that they read.


def linear_gelu_cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor
) -> list[KernelCost]:
    """Of ``linear_gelu``, whose results are like ``hidden`` each."""
    flops = 2 * hidden.numel() * x.shape[-1]
    operands = nbytes(x, weight, bias)
    if TMA_TILES["fwd"] is not None:
        return [KernelCost("linear + GELU", flops, operands + 2 * nbytes(hidden))]
    return [
        KernelCost("linear", flops, operands + nbytes(hidden)),
        KernelCost("GELU", 0, 2 * nbytes(hidden)),
    ]


def linear_gelu_gradient_cost(
    dy: Tensor, weight: Tensor, pre: Tensor, recompute: bool
) -> list[KernelCost]:
    """Of ``linear_gelu_gradient``."""
    flops = 2 * pre.numel() * dy.shape[-1]
    operands = nbytes(dy, weight)
    if TMA_TILES["bwd_recompute" if recompute else "bwd"] is not None:
        return [KernelCost("linear dx * GELU'", flops, operands + (2 + recompute) * nbytes(pre))]
    kernels = [
        KernelCost("linear dx", flops, operands + nbytes(pre)),
        KernelCost("GELU'", 0, 3 * nbytes(pre)),
    ]
    return [*kernels, KernelCost("GELU again", 0, 2 * nbytes(pre))] if recompute else kernels


def weight_gradient_cost(dy: Tensor, x: Tensor, *gradients: Tensor) -> list[KernelCost]:
    """Of ``weight_gradient``, whose results are like ``gradients``."""
    n_cols = x.shape[-1]
    n_tokens, n_rows = x.numel() // n_cols, gradients[0].shape[0]
    flops = 2 * n_tokens * n_rows * n_cols
    rounded = gradients[0].dtype != torch.float32
    tile = TMA_TILES["weight"]
    if tile is None:
        again = 4 * n_rows * n_cols + nbytes(gradients[0]) if rounded else 0
        return [
            KernelCost("linear dweight", flops, nbytes(dy, x) + 4 * n_rows * n_cols),
            KernelCost("linear dweight, rounded", 0, again),
            *(KernelCost("linear dbias", 0, nbytes(dy, dbias)) for dbias in gradients[1:]),
        ]
    block_m, block_n, *_, per_multiprocessor = tile
    n_tiles = triton.cdiv(n_rows, block_m) * triton.cdiv(n_cols, block_n)
    n_splits = splits(n_rows, n_cols, n_tokens, n_tiles, per_multiprocessor * 132)
    partial = 4 * n_splits * n_rows * n_cols
    again = partial + nbytes(*gradients) if n_splits > 1 or rounded else 0
    return [
        KernelCost("linear dweight", flops, nbytes(dy, x) + partial),
        KernelCost("linear dweight, its parts added up", 0, again),
    ]


def weight_gradient(
    dy: Tensor, x: Tensor, has_bias: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """dy (T, M), x (T, N) → ``dyᵀ x`` (M, N) and, if ``has_bias``, the sum of dy over T (M), both
    of ``dtype``, summed in float32."""
    (n_tokens, n_rows), n_cols = dy.shape, x.shape[1]
    tile = _tile("weight", dy, x) if n_tokens and n_rows and n_cols else None
    acc_dtype = torch.promote_types(dy.dtype, torch.float32)
    if tile is None:
        dweight = _host.matmul_float32(dy.t(), x).to(dtype)
        return dweight, dy.sum(0, dtype=acc_dtype).to(dtype) if has_bias else None
    block_m, block_n, block_k, *_, per_multiprocessor = tile
    n_tiles = triton.cdiv(n_rows, block_m) * triton.cdiv(n_cols, block_n)
    slots = per_multiprocessor * _host.multiprocessors(dy.device)
    n_splits = splits(n_rows, n_cols, n_tokens, n_tiles, slots)
    tokens_per_split = triton.cdiv(triton.cdiv(n_tokens, n_splits), block_k) * block_k
    n_splits = triton.cdiv(n_tokens, tokens_per_split)
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
            **_settings(dy, tile),
        )
    if n_splits == 1:
        return dweight[0].to(dtype), None if dbias is None else dbias[0].to(dtype)
    return dweight.sum(0).to(dtype), None if dbias is None else dbias.sum(0).to(dtype)
