"""What every implementation of an op refuses, with the argument, its value and what is allowed.

Needs torch alone, so that ``reference`` and ``portable`` refuse the same input as the Triton
kernels do, in the same words.
"""

import math

import torch
from torch import Tensor

MAX_DROPOUT = 0.999  # the kernels scale what is kept by 1 / (1 - p)


def _facts(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"


def floating(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def same_dtype_and_device(**tensors: Tensor | None) -> None:
    """The first tensor sets the dtype and the device; the others must have both."""
    (first_name, first), *rest = [(n, t) for n, t in tensors.items() if t is not None]
    for name, tensor in rest:
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{name} must have the dtype of {first_name} ({first.dtype}), got {tensor.dtype}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name} ({first.device}), "
                f"got {tensor.device}"
            )


def _options(
    device: torch.device, scale: float | None, dropout_p: float, seed: Tensor | None
) -> None:
    if scale is not None and not 0.0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, or None, got {scale}")
    if not 0.0 <= dropout_p <= MAX_DROPOUT:
        raise ValueError(f"dropout_p must lie in [0, {MAX_DROPOUT}], got {dropout_p}")
    if seed is not None and (seed.numel() != 1 or seed.dtype != torch.int64):
        raise ValueError(f"seed must be an int64 tensor with one element, got {_facts(seed)}")
    if seed is not None and seed.device != device:
        raise ValueError(f"seed must be on the device of the input ({device}), got {seed.device}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    floating(q=q, k=k, v=v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape (B, H, T, D), got {tuple(tensor.shape)}")
    same_dtype_and_device(q=q, k=k, v=v)
    batch, n_head, _, head_size = q.shape
    if k.shape[:2] != (batch, n_head) or k.shape[3] != head_size:
        raise ValueError(
            f"k must have shape ({batch}, {n_head}, T, {head_size}) to go with q "
            f"{tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[2] == 0:
        raise ValueError(f"k must hold at least one key, got shape {tuple(k.shape)}")
    if head_size == 0:
        raise ValueError(f"q must have a head size of at least 1, got shape {tuple(q.shape)}")
    _options(q.device, scale, dropout_p, seed)


def qkvpacked(
    qkv: Tensor, n_head: int, scale: float | None, dropout_p: float, seed: Tensor | None
) -> None:
    floating(qkv=qkv)
    if qkv.dim() != 3:
        raise ValueError(f"qkv must have shape (B, T, 3C), got {tuple(qkv.shape)}")
    if n_head < 1 or qkv.shape[2] == 0 or qkv.shape[2] % (3 * n_head):
        raise ValueError(
            f"the last dimension of qkv must be a multiple of 3 * n_head, "
            f"got {qkv.shape[2]} with n_head={n_head}"
        )
    if qkv.shape[1] == 0:
        raise ValueError(f"qkv must hold at least one token, got shape {tuple(qkv.shape)}")
    _options(qkv.device, scale, dropout_p, seed)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    floating(x=x, weight=weight, bias=bias)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got {tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} must have shape ({x.shape[-1]},) to go with x {tuple(x.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x ({x.device}), got {tensor.device}")
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"weight must have the dtype of x ({x.dtype}) or torch.float32, got {weight.dtype}"
        )
    same_dtype_and_device(weight=weight, bias=bias)
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def gelu(x: Tensor, approximate: str) -> None:
    floating(x=x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
