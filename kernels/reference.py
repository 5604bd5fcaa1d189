"""Reference implementations of all ops in plain PyTorch: the ground truth for the tests and the
naive baseline of the benchmarks.

``fused``, ``torch_ops`` and ``fastgpt.ops`` have the same names and signatures; ``OPS`` is the only
list of them. Autograd derives the backward passes, so they share no error with hand-written ones.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import _checks
from fastgpt.kernels._tensors import as_matrix, attention_scale, unpacked

# Each op, and the module in kernels/ with its Triton implementation.
OPS = {
    "adamw": "adamw",
    "attention": "attention",
    "attention_decode": "attention_decode",
    "attention_qkvpacked": "attention",
    "embedding": "embedding",
    "gelu": "gelu",
    "layer_norm": "layer_norm",
    "linear": "linear",
    "linear_cross_entropy": "linear_cross_entropy",
    "mlp": "mlp",
    "residual_layer_norm": "layer_norm",
}

# The ops of a transformer block, in the order of ``block_kernels``' arguments.
OPS_OF_A_BLOCK = "linear", "attention_qkvpacked", "mlp", "residual_layer_norm"

# The ops for which ``fused_rows`` uses PyTorch.
OPS_OF_TENSOR_CORES = "attention", "attention_qkvpacked"


def dropout_seed(device: torch.device) -> Tensor | None:
    """None: here PyTorch's generator draws the masks."""
    return None


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU (Hendrycks & Gimpel 2016): ``x * Phi(x)``, or its tanh form. See ``fused.gelu``."""
    _checks.gelu(x, approximate)
    if approximate == "tanh":
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1.0 + torch.tanh(inner))
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm (Ba et al. 2016) over the last dimension. See ``fused.layer_norm``."""
    _checks.layer_norm(x, weight, bias, eps)
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    y = centred * torch.rsqrt(variance + eps) * weight
    return (y if bias is None else y + bias).to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_offset: int = 0,
    doc_start: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Attention as a masked matrix product that stores all (Tq, Tk) scores. Same arguments as
    ``fused.attention``; without a ``seed``, PyTorch's generator draws the dropout mask.
    """
    _checks.attention(
        q, k, v, causal, scale, dropout_p, seed, dropout_offset, doc_start, key_lengths
    )
    k, v = (each_query_head(x, q.shape[1]) for x in (k, v))
    if key_lengths is not None:
        k, v, visible_keys = padding_hidden(k, v, key_lengths)
    scores = (q @ k.mT) * attention_scale(scale, q.shape[-1])  # (B, H, Tq, Tk)
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if doc_start is not None:
            visible = document_mask(doc_start)
        scores = scores.masked_fill(~visible, float("-inf"))
    if key_lengths is not None:
        scores = scores.masked_fill(~visible_keys, float("-inf"))
    probs = torch.softmax(scores, dim=-1)
    return _dropout(probs, dropout_p, seed, dropout_offset) @ v


def each_query_head(x: Tensor, n_head: int) -> Tensor:
    """Repeat keys or values (B, H_kv, T, D) for the query heads that share them."""
    return x if x.shape[1] == n_head else x.repeat_interleave(n_head // x.shape[1], dim=1)


def padding_hidden(k: Tensor, v: Tensor, key_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k and v with zeros instead of padding, which may be NaN, and a bool mask (B, 1, 1, Tk) of the
    keys that a query sees. With a length of 0, a query sees the first key, which is zero: without
    any key, the softmax would be 0 / 0."""
    keys = torch.arange(k.shape[2], device=k.device)
    lengths = key_lengths[:, None, None, None]
    padding = (keys >= lengths).mT  # (B, 1, Tk, 1)
    k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    return k, v, keys < lengths.clamp(min=1)


def document_mask(doc_start: Tensor) -> Tensor:
    """Bool mask (B, 1, T, T): a query sees the keys from the start of its document to itself."""
    keys = torch.arange(doc_start.shape[1], device=doc_start.device)
    return ((keys >= doc_start[..., None]) & (keys <= keys[:, None]))[:, None]


def attention_qkvpacked(
    qkv: Tensor,
    n_head: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_offset: int = 0,
    doc_start: Tensor | None = None,
) -> Tensor:
    """Attention on packed (B, T, 3C), giving (B, T, C). See ``fused.attention_qkvpacked``."""
    _checks.qkvpacked(qkv, n_head, causal, scale, dropout_p, seed, dropout_offset, doc_start)
    return unpacked(
        attention, qkv, n_head, causal, scale, dropout_p, seed, dropout_offset, doc_start
    )


def attention_decode(
    qkv: Tensor, cache: Tensor, positions: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention for one new token per sequence over a cache of keys and values. See
    ``fused.attention_decode``."""
    _checks.attention_decode(qkv, cache, positions, scale)
    n_head, n_slots, head_size = cache.shape[2:]
    q, k, v = qkv.unflatten(2, (3, n_head, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, 1, D)
    slots = torch.arange(n_slots, device=qkv.device)
    place = positions[:, None]
    inside = (place >= 0) & (place < n_slots)
    here = (slots == place)[:, None, :, None]
    cache.copy_(torch.stack([new.where(here, old) for new, old in zip((k, v), cache, strict=True)]))
    visible = ((slots <= place) & inside)[:, None, None, :]
    scores = (q @ cache[0].mT) * attention_scale(scale, head_size)  # (B, H, 1, S)
    probs = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
    values = cache[1].where(visible.transpose(-2, -1), 0.0)  # unfilled slots may be NaN
    return (probs @ values).transpose(1, 2).flatten(2)


def embedding(
    idx: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_offset: int = 0,
    doc_start: Tensor | None = None,
) -> Tensor:
    """Token plus position embedding, with dropout. See ``fused.embedding``."""
    _checks.embedding(
        idx, token_weight, position_weight, dropout_p, seed, dropout_offset, doc_start
    )
    positions = torch.arange(idx.shape[1], device=idx.device)
    if doc_start is not None:
        positions = positions - doc_start
    x = token_weight[idx] + position_weight[positions]  # (B, T, C)
    return _dropout(x.flatten(0, 1), dropout_p, seed, dropout_offset).view_as(x)


def residual_layer_norm(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    delta_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of a residual sum, and the sum. See ``fused.residual_layer_norm``."""
    _checks.residual_layer_norm(
        residual, delta, weight, bias, eps, delta_bias, dropout_p, seed, dropout_offset
    )
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)
    rows = _dropout(as_matrix(delta), dropout_p, seed, dropout_offset)
    total = (residual + rows.view_as(residual)).to(residual.dtype)
    weight, bias = widened(weight, bias, total.dtype)
    return layer_norm(total, weight, bias, eps).to(delta.dtype), total


def widened(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Parameters in the wider of their own dtype and ``dtype``."""
    dtype = torch.promote_types(weight.dtype, dtype)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def fp8_scale(x: Tensor) -> Tensor:
    """The smallest power of two s, at least 2^-126, for which x / s fits in e4m3; float64. NaN if x
    holds an infinity or a NaN."""
    if x.numel() == 0:
        return x.new_ones((), dtype=torch.float64)
    largest = x.detach().abs().amax().double()
    mantissa, exponent = torch.frexp(largest / 448)  # mantissa in [1/2, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-126)
    return torch.exp2(exponent.double()).where(largest.isfinite(), math.nan)


def fp8_rounded(x: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """x after rounding to fp8, in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = scale.to(x.dtype)
    return (x / scale).to(dtype).to(x.dtype) * scale


class _InFp8(torch.autograd.Function):
    """Round an activation or a weight to e4m3; the gradient passes through unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return fp8_rounded(x, torch.float8_e4m3fn, fp8_scale(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].to(ctx.dtype)


def _with_gradient_in_fp8(total: Tensor, logits: Tensor, product: Tensor) -> Tensor:
    """``total``, a function of the leaf ``logits``, as a function of ``product`` whose gradient is
    rounded to e5m2 before any factor is applied. It is at most 1, so its scale is fixed."""
    if not product.requires_grad:
        return total.detach()
    (dlogits,) = torch.autograd.grad(total, logits)
    dlogits = fp8_rounded(dlogits, torch.float8_e5m2, dlogits.new_tensor(2.0**-15))
    return total.detach() + ((product - product.detach()) * dlogits).sum()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recompute: _checks.Recompute | None = None,
) -> Tensor:
    """``x @ weight.T + bias``. See ``fused.linear``; here autograd saves x regardless of
    ``recompute``."""
    _checks.linear(x, weight, bias, recompute)
    y = x @ weight.to(x.dtype).t()
    return y if bias is None else y + bias.to(y.dtype)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    *,
    approximate: str = "none",
    recompute: _checks.Recompute | None = None,
) -> Tensor:
    """``linear``, GELU, ``linear`` without a bias. See ``fused.mlp``; here autograd saves all
    intermediates regardless of ``recompute``."""
    _checks.mlp(x, fc_weight, fc_bias, proj_weight, approximate, recompute)
    return linear(gelu(linear(x, fc_weight, fc_bias), approximate), proj_weight)


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
    """Cross-entropy of the logits ``x @ weight.T``, which are all stored here, in float32. See
    ``fused.linear_cross_entropy``; with fp8, the operands are rounded to 8 bits and multiplied in
    float32 or wider, on any device and in any dtype."""
    _checks.linear_cross_entropy(
        x, weight, targets, ignore_index, reduction, label_smoothing, z_loss, fp8
    )
    if fp8:
        product = as_matrix(_InFp8.apply(x) @ _InFp8.apply(weight).t())
        logits = product.detach().to(x.dtype)
        logits = logits.to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
    else:
        logits = as_matrix(linear(x, weight))  # (rows, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.flatten().long()
    valid = targets != ignore_index
    lse = torch.logsumexp(logits, dim=-1)
    at_target = logits.gather(1, targets.where(valid, 0)[:, None])[:, 0]
    loss = lse - (1.0 - label_smoothing) * at_target - label_smoothing * logits.mean(-1)
    total = (loss + z_loss * lse * lse).where(valid, 0.0).sum()
    if fp8:
        total = _with_gradient_in_fp8(total, logits, product)
    return total / valid.sum() if reduction == "mean" else total


def adamw(
    param: Tensor,
    rounded: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """AdamW in plain PyTorch, with scalars in float64. See ``fused.adamw``."""
    _checks.adamw(
        param, rounded, grad, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay, clip, skip
    )
    if skip is not None and skip.item() != 0.0:
        return
    step += 1
    grad = grad if clip is None else grad * clip
    exp_avg.mul_(betas[0]).add_((1.0 - betas[0]) * grad)
    exp_avg_sq.mul_(betas[1]).add_((1.0 - betas[1]) * grad.square())
    mean = exp_avg / (1.0 - betas[0] ** step.item())
    square = exp_avg_sq / (1.0 - betas[1] ** step.item())
    param.mul_(1.0 - lr.item() * weight_decay).sub_(lr * mean / (square.sqrt() + eps))
    if rounded is not None:
        rounded.copy_(param)


# Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a block
# cipher that turns a counter into 128 random bits. An element's bits depend only on its position,
# so the backward recomputes the forward's mask and nothing is stored.
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _mul_hi_lo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for a in [0, 2^32) held in int64 (no uint64 in PyTorch)."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return (high >> 16) & _LOW, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_4x32(key: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox. ``key`` has 64 bits; counter and result are four int64 tensors of
    32-bit words."""
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    c0, c1, c2, c3 = counter
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, _PHILOX_M0)
        hi1, lo1 = _mul_hi_lo(c2, _PHILOX_M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W0) & _LOW, (k1 + _PHILOX_W1) & _LOW
    return c0, c1, c2, c3


def dropout_mask(
    seed: Tensor, shape: tuple[int, ...], dropout_p: float, dropout_offset: int = 0
) -> tuple[Tensor, float]:
    """The Triton kernels' mask for a tensor of ``shape`` (..., M, N), True for kept elements; and
    the keep probability, 1 - round(dropout_p * 2^16) / 2^16.

    One Philox block yields 16 bits for each of eight adjacent columns. Its counter is
    (j // 8, i, plane, dropout_offset) for row i and column j, where the planes are the (M, N)
    matrices in order. Column j uses word j % 4, the upper half if j % 8 >= 4.
    """
    *planes, n_rows, n_cols = shape
    device = seed.device
    j = torch.arange(-(-n_cols // 8), device=device)[None, None, :]
    i = torch.arange(n_rows, device=device)[None, :, None]
    plane = torch.arange(math.prod(planes), device=device)[:, None, None]
    c0, c1, c2 = torch.broadcast_tensors(j, i, plane)
    c3 = torch.full_like(c0, dropout_offset)
    words = torch.stack(philox_4x32(int(seed), (c0, c1, c2, c3)), dim=-1)
    bits = torch.cat([words & 0xFFFF, words >> 16], dim=-1)  # (planes, M, N / 8, 8)
    threshold = round(dropout_p * 65536)
    keep = (bits >= threshold).reshape(*planes, n_rows, 8 * j.numel())[..., :n_cols]
    return keep, 1.0 - threshold / 65536


def _dropout(x: Tensor, dropout_p: float, seed: Tensor | None, dropout_offset: int) -> Tensor:
    if dropout_p == 0.0:
        return x
    if seed is None:
        return torch.dropout(x, dropout_p, train=True)
    keep, share = dropout_mask(seed, x.shape, dropout_p, dropout_offset)
    return torch.where(keep, x / share, 0.0)
