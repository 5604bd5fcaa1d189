"""The lines of the launch tables of attention and of the matrix products."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench._sweep.line import (
    Call,
    Line,
    Sizes,
    Tile,
    around,
    candidates,
    gradients,
    in_dict,
    leaf,
    stage_counts,
)
from fastgpt.kernels import _host, attention_tiles, fused, gemm
from fastgpt.kernels.costs import attention_pairs

# -------------------------------------------------------------------------------------- attention


def attention_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
    table = attention_tiles.tiles(capability, dtype)
    limits = attention_tiles.MAX_REGISTERS
    for head_size in (64, 128):
        for kernel in ("fwd", "dq", "dkdv"):
            key = (kernel, head_size)
            block_m, block_n, num_warps, num_stages = table[key]
            limited = capability == 90 and _host.is_half(dtype) and kernel == "fwd"
            current = (*table[key], limits.get(key, 0)) if limited else table[key]
            lengths = ((32, 1024), (8, 4096), (128, 256), (2, 16384), (512, 64))
            yield Line(
                name=f"attention {kernel}, head size {head_size}",
                current=current,
                candidates=candidates(
                    current,
                    around(block_m, 16, 256),
                    around(block_n, 16, 256),
                    (4, 8),
                    stage_counts(num_stages),
                    *([(0, 128)] if limited else []),
                ),
                put=_with_limit(table, limits, key) if limited else in_dict(table, key),
                call=_attention_forward if kernel == "fwd" else _attention_backward,
                sizes=tuple(dict(B=b, T=t, H=768 // head_size, D=head_size) for b, t in lengths),
                probe=dict(B=1, T=1024, H=2, D=head_size),
                kernels=(
                    "_attention_fwd_kernel"
                    if kernel == "fwd"
                    else f"_attention_bwd_{kernel}_kernel",
                ),
                text=_attention_text(key, limited),
            )


def _with_limit(
    table: dict[Any, Any], limits: dict[Any, int], key: tuple[str, int]
) -> Callable[[Tile], AbstractContextManager[None]]:
    """The last number of a candidate is the registers that a thread may have; 0 for no limit."""

    @contextmanager
    def put(tile: Tile) -> Iterator[None]:
        assert tile is not None
        *shape, limit = tile
        with mock.patch.dict(table, {key: tuple(shape)}), mock.patch.dict(limits):
            limits.pop(key, None)
            if limit:
                limits[key] = limit
            yield

    return put


def _attention_text(key: tuple[str, int], limited: bool) -> Callable[[Tile], str]:
    name = f'("{key[0]}", {key[1]})'

    def text(tile: Tile) -> str:
        if not limited or tile is None:
            return f"{name}: {tile},"
        *shape, limit = tile
        note = f"{name}: {limit}" if limit else f"nothing for {name}"
        return f"{name}: {tuple(shape)},  # MAX_REGISTERS: {note}"

    return text


def _attention_forward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    qkv, n_head, product, nbytes = _attention_inputs(device, dtype, sizes)
    qkv = qkv.detach()
    return Call(lambda: [fused.attention_qkvpacked(qkv, n_head)], 2 * product, 4 * nbytes)


def _attention_backward(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    """Both kernels: one needs what the other wrote."""
    qkv, n_head, product, nbytes = _attention_inputs(device, dtype, sizes)
    backward = gradients(fused.attention_qkvpacked(qkv, n_head), [qkv])
    return Call(backward, 5 * product, 9 * nbytes)


def _attention_inputs(
    device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> tuple[Tensor, int, int, int]:
    """qkv, heads, FLOPs of one product under the diagonal, bytes of (B, T, C)."""
    batch, length, n_head, head_size = (sizes[name] for name in "BTHD")
    qkv = leaf(device, dtype, batch, length, 3 * n_head * head_size)
    product = 2 * batch * n_head * attention_pairs(length, length, causal=True) * head_size
    return qkv, n_head, product, qkv.numel() // 3 * dtype.itemsize


# ------------------------------------------------------------------------------------------- GEMMs


def gemm_lines(capability: int | None, dtype: torch.dtype) -> Iterator[Line]:
    if capability is None:
        table = gemm.INTERPRETER_TILES
    elif dtype == torch.float32:
        return  # cuBLAS
    elif 90 <= capability < 120:
        table = gemm.TMA_TILES
    else:
        table = gemm.POINTER_TILES
    calls = {
        "fwd": _linear_gelu,
        "bwd": _linear_gelu_gradient,
        "bwd_recompute": _linear_gelu_gradient_recompute,
        "weight": _weight_gradient,
    }
    kernel_sizes = {
        # fc and its gradient: (M, K) by (K, N)
        True: ((32768, 768, 3072), (8192, 1600, 6400), (16384, 384, 1536), (4096, 768, 3072)),
        # the gradients of fc, qkv, projection and fc2: (T, M)ᵀ by (T, N)
        False: ((32768, 3072, 768), (32768, 2304, 768), (32768, 768, 768), (4096, 3072, 768)),
    }
    for kernel, call in calls.items():
        current = table[kernel]
        block_m, block_n, block_k, _, num_stages, _ = current or (128, 128, 64, 8, 3, 2)
        tiles = candidates(
            current,
            around(block_m, 64, 256),
            around(block_n, 64, 256),
            sorted({32, 64, block_k}),
            (4, 8),
            stage_counts(num_stages),
            (1,),
        )
        epilogue = kernel != "weight"
        names = ("M", "K", "N") if epilogue else ("T", "M", "N")
        yield Line(
            name=f"gemm {kernel}",
            current=current,
            candidates=tiles if current is None else (*tiles, None),
            put=in_dict(table, kernel),
            call=call,
            sizes=tuple(dict(zip(names, sizes, strict=True)) for sizes in kernel_sizes[epilogue]),
            probe=dict(zip(names, (256, 256, 256), strict=True)),
            kernels=("_linear_gelu_kernel" if epilogue else "_weight_grad_kernel",),
            text=lambda tile, kernel=kernel: f'"{kernel}": {tile},',  # type: ignore
            resident=True,
        )


def _linear_gelu(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    m, k, n = sizes["M"], sizes["K"], sizes["N"]
    x, weight = leaf(device, dtype, m, k).detach(), leaf(device, dtype, n, k, std=0.02).detach()
    bias = leaf(device, dtype, n).detach()
    nbytes = dtype.itemsize * (m * k + n * k + n + 2 * m * n)
    return Call(lambda: gemm.linear_gelu(x, weight, bias, "none"), 2 * m * n * k, nbytes)


def _linear_gelu_gradient(
    device: torch.device, dtype: torch.dtype, sizes: Sizes, recompute: bool = False
) -> Call:
    m, k, n = sizes["M"], sizes["K"], sizes["N"]
    dy, weight = leaf(device, dtype, m, k).detach(), leaf(device, dtype, k, n, std=0.02).detach()
    pre = leaf(device, dtype, m, n).detach()
    nbytes = dtype.itemsize * (m * k + n * k + (3 if recompute else 2) * m * n)

    def run() -> list[Tensor]:
        found = gemm.linear_gelu_gradient(dy, weight, pre, "none", recompute)
        return [x for x in found if x is not None]

    return Call(run, 2 * m * n * k, nbytes)


def _linear_gelu_gradient_recompute(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    return _linear_gelu_gradient(device, dtype, sizes, recompute=True)


def _weight_gradient(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
    t, m, n = sizes["T"], sizes["M"], sizes["N"]
    dy, x = leaf(device, dtype, t, m).detach(), leaf(device, dtype, t, n).detach()

    def run() -> list[Tensor]:
        return [g for g in gemm.weight_gradient(dy, x, True, torch.float32) if g is not None]

    return Call(run, 2 * t * m * n, dtype.itemsize * t * (m + n) + 4 * (m * n + m))
