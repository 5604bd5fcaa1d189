"""Argument checks shared by all implementations of an op. Errors name argument, value and limits.

Needs only torch, so that ``reference`` and ``torch_ops`` reject the same inputs as the Triton
kernels, with the same messages.
"""

import math
from typing import Any

import torch
from torch import Tensor

MAX_DROPOUT = 0.999  # the kernels scale kept elements by 1 / (1 - p)


def _facts(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"


def _tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def _of_dtype(name: str, tensor: Any, *dtypes: torch.dtype) -> None:
    _tensor(name, tensor)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def _within(name: str, number: Any, least: float, most: float, must: str, *excluded: float) -> None:
    """``must``: the allowed range in words; ``excluded``: limits that are not allowed. If ``least``
    is an int, floats are rejected."""
    whole = type(least) is int
    try:
        if whole and isinstance(number, float):
            raise TypeError
        if least <= number <= most and number not in excluded:
            return
    except TypeError:
        kind = "an integer" if whole else "a number"
        raise TypeError(f"{name} must be {kind}, got {number!r}") from None
    raise ValueError(f"{name} must {must}, got {number}")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        _tensor(name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def _same(what: str, first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """``what``: "dtype" or "device"."""
    wanted = getattr(first, what)
    for name, tensor in others.items():
        if tensor is not None and getattr(tensor, what) != wanted:
            must = "be on" if what == "device" else "have"
            raise ValueError(
                f"{name} must {must} the {what} of {first_name} ({wanted}), "
                f"got {getattr(tensor, what)}"
            )


def _parameters(
    x_name: str, x: Tensor, first_name: str, first: Tensor, **others: Tensor | None
) -> None:
    """All parameters must have one dtype: that of their activations x, or float32."""
    given = {name: tensor for name, tensor in others.items() if tensor is not None}
    parameters = {first_name: first, **given}
    floating(**parameters)
    allowed = x.dtype, torch.float32
    for name, tensor in parameters.items():
        if tensor.dtype not in allowed:
            raise ValueError(
                f"{name} must have the dtype of {x_name} ({x.dtype}) or torch.float32, "
                f"got {tensor.dtype}"
            )
    _same("dtype", first_name, first, **given)
    _same("device", first_name, first, **given)
    _same("device", x_name, x, **{first_name: first})


def _normalised(
    x_name: str, x: Tensor, weight: Tensor, eps: float, **others: Tensor | None
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{x_name} must have a last dimension of at least 1, got {tuple(x.shape)}")
    _parameters(x_name, x, "weight", weight, **others)
    _shaped((x.shape[-1],), x_name, x, weight=weight, **others)
    _within("eps", eps, 0.0, math.inf, "be at least 0")


def _shaped(shape: tuple[int, ...], x_name: str, x: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to go with {x_name} {tuple(x.shape)}, "
                f"got {tuple(tensor.shape)}"
            )


def _dropout(
    device: torch.device, dropout_p: float, seed: Tensor | None, dropout_offset: int
) -> None:
    _within("dropout_p", dropout_p, 0.0, MAX_DROPOUT, "lie in [0, 0.999]")
    if seed is not None:
        _tensor("seed", seed)
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(f"seed must be an int64 tensor with one element, got {_facts(seed)}")
        if seed.device != device:
            raise ValueError(
                f"seed must be on the device of the input ({device}), got {seed.device}"
            )
    _within("dropout_offset", dropout_offset, 0, 2**31 - 1, "lie in [0, 2^31)")


def _scale(scale: float | None) -> None:
    if scale is not None:
        _within("scale", scale, 0.0, math.inf, "be positive and finite, or None", 0.0, math.inf)


def _int32(shape: tuple[int, ...], x_name: str, x: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        _of_dtype(name, tensor, torch.int32)
    _shaped(shape, x_name, x, **tensors)
    _same("device", x_name, x, **tensors)


def _documents(
    doc_start: Tensor | None, x_name: str, x: Tensor, shape: tuple[int, int], causal: bool = True
) -> None:
    """``shape``: (B, T) of x."""
    if doc_start is None:
        return
    if not causal:
        raise ValueError("doc_start must be None with causal=False, got a tensor")
    _int32(shape, x_name, x, doc_start=doc_start)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    dropout_offset: int,
    doc_start: Tensor | None,
    key_lengths: Tensor | None,
) -> None:
    floating(q=q, k=k, v=v)
    _flag("causal", causal)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape (B, H, T, D), got {tuple(tensor.shape)}")
    _same("dtype", "q", q, k=k, v=v)
    _same("device", "q", q, k=k, v=v)
    batch, n_head, n_queries, head_size = q.shape
    k_batch, n_kv_head, n_keys, k_head_size = k.shape
    grouped = 0 < n_kv_head < n_head and n_head % n_kv_head == 0
    if not (k_batch == batch and (grouped or n_kv_head == n_head) and k_head_size == head_size):
        raise ValueError(
            f"k must have shape ({batch}, {n_head}, T, {head_size}), or a divisor of {n_head} as "
            f"its number of heads, to go with q {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if n_keys == 0:
        raise ValueError(f"k must hold at least one key, got shape {tuple(k.shape)}")
    if head_size == 0:
        raise ValueError(f"q must have a head size of at least 1, got shape {tuple(q.shape)}")
    _scale(scale)
    _dropout(q.device, dropout_p, seed, dropout_offset)
    if doc_start is not None and n_queries != n_keys:
        raise ValueError(
            f"doc_start must be None unless q and k are equally long, got q {tuple(q.shape)} "
            f"and k {tuple(k.shape)}"
        )
    _documents(doc_start, "q", q, (batch, n_queries), causal)
    if key_lengths is not None:
        if doc_start is not None:
            raise ValueError("key_lengths must be None together with doc_start, got a tensor")
        _int32((batch,), "q", q, key_lengths=key_lengths)


def qkvpacked(
    qkv: Tensor,
    n_head: int,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    dropout_offset: int,
    doc_start: Tensor | None,
) -> None:
    floating(qkv=qkv)
    if qkv.dim() != 3:
        raise ValueError(f"qkv must have shape (B, T, 3C), got {tuple(qkv.shape)}")
    _flag("causal", causal)
    _within("n_head", n_head, 1, math.inf, "be at least 1")
    batch, length, width = qkv.shape
    if width == 0 or width % (3 * n_head):
        raise ValueError(
            f"the last dimension of qkv must be a multiple of 3 * n_head, "
            f"got {width} with n_head={n_head}"
        )
    if length == 0:
        raise ValueError(f"qkv must hold at least one token, got shape {tuple(qkv.shape)}")
    _scale(scale)
    _dropout(qkv.device, dropout_p, seed, dropout_offset)
    _documents(doc_start, "qkv", qkv, (batch, length), causal)


def attention_decode(qkv: Tensor, cache: Tensor, positions: Tensor, scale: float | None) -> None:
    floating(qkv=qkv, cache=cache)
    if qkv.dim() != 3 or qkv.shape[1] != 1:
        raise ValueError(f"qkv must have shape (B, 1, 3C), got {tuple(qkv.shape)}")
    batch, _, width = qkv.shape
    fits = cache.dim() == 5 and cache.shape[:2] == (2, batch) and cache.shape[3] > 0
    if not fits or width == 0 or 3 * cache.shape[2] * cache.shape[4] != width:
        raise ValueError(
            f"cache must have shape (2, {batch}, H, S, D) with 3 * H * D = {width} to go with qkv "
            f"{tuple(qkv.shape)}, got {tuple(cache.shape)}"
        )
    if not cache.is_contiguous():
        raise ValueError(f"cache must be contiguous, got strides {cache.stride()}")
    _same("dtype", "qkv", qkv, cache=cache)
    _of_dtype("positions", positions, torch.int64, torch.int32)
    _shaped((batch,), "qkv", qkv, positions=positions)
    _same("device", "qkv", qkv, cache=cache, positions=positions)
    if not positions.is_contiguous():
        raise ValueError(f"positions must be contiguous, got strides {positions.stride()}")
    _scale(scale)
    if batch and positions.device.type == "cpu" and not torch.compiler.is_compiling():
        for place in map(int, positions.aminmax()):
            if not 0 <= place < cache.shape[3]:
                raise ValueError(f"positions must lie in [0, {cache.shape[3]}), got {place}")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    floating(x=x)
    _normalised("x", x, weight, eps, bias=bias)


def residual_layer_norm(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    delta_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    dropout_offset: int,
) -> None:
    floating(residual=residual, delta=delta)
    _shaped(tuple(residual.shape), "residual", residual, delta=delta)
    if delta.dtype not in (residual.dtype, torch.float16, torch.bfloat16):
        raise ValueError(
            f"delta must have the dtype of residual ({residual.dtype}) or a half-precision one, "
            f"got {delta.dtype}"
        )
    _same("device", "residual", residual, delta=delta)
    _normalised("delta", delta, weight, eps, bias=bias, delta_bias=delta_bias)
    _dropout(residual.device, dropout_p, seed, dropout_offset)


def gelu(x: Tensor, approximate: str) -> None:
    floating(x=x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")


Recompute = tuple[Tensor, Tensor, Tensor | None, float]  # the arguments of layer_norm


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recompute: Recompute | None = None,
    prefix: str = "",
    **more: Tensor,
) -> None:
    """``prefix``: of the argument names weight and bias; ``more``: parameters of the same dtype."""
    w = f"{prefix}weight"
    floating(x=x)
    _parameters("x", x, w, weight, **{f"{prefix}bias": bias}, **more)
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{w} must have shape (N, K) to go with x (..., K), got {tuple(weight.shape)} "
            f"and x {tuple(x.shape)}"
        )
    _shaped((weight.shape[0],), w, weight, **{f"{prefix}bias": bias})
    if recompute is None:
        return
    if len(recompute) != 4:
        raise ValueError(
            f"recompute must be (x, weight, bias, eps) of layer_norm, got {len(recompute)} items"
        )
    source, _, _, eps = recompute
    _tensor("recompute[0]", source)
    _within("recompute[3]", eps, 0.0, math.inf, "be at least 0")
    if source.shape != x.shape or source.device != x.device:
        raise ValueError(
            f"recompute must begin with a tensor of x's shape and device, got {_facts(source)} "
            f"for x {_facts(x)}"
        )


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    approximate: str,
    recompute: Recompute | None,
) -> None:
    _tensor("proj_weight", proj_weight)
    linear(x, fc_weight, fc_bias, recompute, "fc_", proj_weight=proj_weight)
    gelu(x, approximate)
    if proj_weight.dim() != 2 or proj_weight.shape[1] != fc_weight.shape[0]:
        raise ValueError(
            f"proj_weight must have shape (N, {fc_weight.shape[0]}) to go with fc_weight "
            f"{tuple(fc_weight.shape)}, got {tuple(proj_weight.shape)}"
        )


def embedding(
    idx: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    dropout_offset: int,
    doc_start: Tensor | None,
) -> None:
    _of_dtype("idx", idx, torch.int64, torch.int32)
    if idx.dim() != 2:
        raise ValueError(f"idx must have shape (B, T), got {tuple(idx.shape)}")
    floating(token_weight=token_weight, position_weight=position_weight)
    _same("dtype", "token_weight", token_weight, position_weight=position_weight)
    _same("device", "token_weight", token_weight, position_weight=position_weight)
    _same("device", "idx", idx, token_weight=token_weight)
    if token_weight.dim() != 2 or 0 in token_weight.shape:
        raise ValueError(f"token_weight must have shape (V, C), got {tuple(token_weight.shape)}")
    width = token_weight.shape[1]
    if position_weight.dim() != 2 or position_weight.shape[1] != width:
        raise ValueError(
            f"position_weight must have shape (P, {width}) to go with token_weight "
            f"{tuple(token_weight.shape)}, got {tuple(position_weight.shape)}"
        )
    if position_weight.shape[0] < idx.shape[1]:
        raise ValueError(
            f"position_weight must have a row for each of the {idx.shape[1]} positions of idx, "
            f"got {tuple(position_weight.shape)}"
        )
    _dropout(idx.device, dropout_p, seed, dropout_offset)
    _documents(doc_start, "idx", idx, (idx.shape[0], idx.shape[1]))


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    fp8: bool,
) -> None:
    linear(x, weight, None)
    _flag("fp8", fp8)
    if fp8 and (0 in weight.shape or any(size % 16 for size in weight.shape)):
        raise ValueError(  # rows of 8-bit matrices begin at multiples of 16 bytes
            f"both sizes of weight must be multiples of 16 with fp8=True, got {tuple(weight.shape)}"
        )
    _of_dtype("targets", targets, torch.int64, torch.int32)
    _shaped(tuple(x.shape[:-1]), "x", x, targets=targets)
    _same("device", "x", x, targets=targets)
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have a row for each class, got {tuple(weight.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    _within("ignore_index", ignore_index, -(2**63), 2**63 - 1, "lie in [-2^63, 2^63)")
    _within("label_smoothing", label_smoothing, 0.0, 1.0, "lie in [0, 1]")
    _within("z_loss", z_loss, 0.0, math.inf, "be at least 0 and finite", math.inf)
    if fp8 and z_loss:  # the fixed scale requires that no gradient of a logit exceeds 1
        raise ValueError(f"z_loss must be 0 with fp8=True, got {z_loss}")


def adamw(
    param: Tensor,
    rounded: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: Tensor | None,
    skip: Tensor | None,
) -> None:
    floating(param=param)
    flat: dict[str, Any] = dict(
        param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, rounded=rounded
    )
    scalars: dict[str, Any] = dict(step=step, lr=lr, clip=clip, skip=skip)
    for name, tensor in (flat | scalars).items():
        if tensor is None and name in ("rounded", "clip", "skip"):
            continue
        if name == "rounded":
            _of_dtype(name, tensor, torch.float16, torch.bfloat16)
        else:
            _of_dtype(name, tensor, torch.float32)
        shape = tuple(param.shape) if name in flat else ()
        if tensor.shape != shape or tensor.dim() > 1 or not tensor.is_contiguous():
            wanted = f"the shape (N,) of param, {tuple(param.shape)}" if shape else "shape ()"
            raise ValueError(
                f"{name} must have {wanted}, contiguous, got {tuple(tensor.shape)}, "
                f"strides {tensor.stride()}"
            )
    _same("device", "param", param, **flat, **scalars)
    try:
        beta1, beta2 = betas
    except (TypeError, ValueError):
        raise TypeError(f"betas must be two numbers, got {betas!r}") from None
    _within("betas[0]", beta1, 0.0, 1.0, "lie in [0, 1)", 1.0)
    _within("betas[1]", beta2, 0.0, 1.0, "lie in [0, 1)", 1.0)
    _within("eps", eps, 0.0, math.inf, "be at least 0 and finite", math.inf)
    _within("weight_decay", weight_decay, 0.0, math.inf, "be at least 0 and finite", math.inf)
