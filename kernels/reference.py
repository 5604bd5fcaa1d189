"""Every op written out plainly in PyTorch: the truth that the tests compare with, and the naive
baseline that the benchmark times.

Same names and signatures as in ``fused`` and ``portable``. Autograd derives the backward passes,
so nothing here shares an idea, or an error, with a hand-written one.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt.kernels import _checks


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
) -> Tensor:
    """Attention as a masked matrix product: the (Tq, Tk) scores are all stored. Same arguments as
    ``fused.attention``; without a ``seed`` the dropout mask comes from PyTorch's generator.
    """
    _checks.attention(q, k, v, scale, dropout_p, seed)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    scores = (q @ k.transpose(-2, -1)) * scale  # (B, H, Tq, Tk)
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    probs = torch.softmax(scores, dim=-1)
    if dropout_p > 0.0:
        if seed is None:
            probs = torch.dropout(probs, dropout_p, train=True)
        else:
            keep, keep_prob = attention_dropout_mask(seed, probs.shape, dropout_p)
            probs = torch.where(keep, probs / keep_prob, 0.0)
    return probs @ v


def attention_qkvpacked(
    qkv: Tensor,
    n_head: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The same on packed (B, T, 3C), giving (B, T, C). See ``fused.attention_qkvpacked``."""
    return unpacked(attention, qkv, n_head, causal, scale, dropout_p, seed)


def unpacked(
    attention: Callable[..., Tensor],
    qkv: Tensor,
    n_head: int,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """``attention_qkvpacked`` by an ``attention`` that wants q, k and v apart."""
    _checks.qkvpacked(qkv, n_head, scale, dropout_p, seed)
    q, k, v = split_heads(qkv, n_head)
    y = attention(q, k, v, causal=causal, scale=scale, dropout_p=dropout_p, seed=seed)
    return y.transpose(1, 2).reshape(*qkv.shape[:2], -1)  # (B, T, C)


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3C) → three views (B, H, T, D) with C = H * D; nothing is copied."""
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, n_head, width // (3 * n_head)).permute(2, 0, 3, 1, 4)
    return q, k, v


# Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a block
# cipher that turns a counter into 128 random bits. Any element's bits follow from its position, so
# forward and backward find the same mask and nothing is stored.
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _mul_hi_lo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for a in [0, 2^32) held in int64 (no uint64 in PyTorch)."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return (high >> 16) & _LOW, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_4x32(key: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds. ``key`` has 64 bits; counter and result: four int64 tensors of 32-bit words."""
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    c0, c1, c2, c3 = counter
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, _PHILOX_M0)
        hi1, lo1 = _mul_hi_lo(c2, _PHILOX_M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W0) & _LOW, (k1 + _PHILOX_W1) & _LOW
    return c0, c1, c2, c3


def attention_dropout_mask(
    seed: Tensor, shape: torch.Size, dropout_p: float
) -> tuple[Tensor, float]:
    """The mask of the Triton kernels: True where the probability (b, h, i, j) is kept, and the
    share that is kept, 1 - round(dropout_p * 2^16) / 2^16.

    One Philox block serves eight neighbouring keys with 16 bits each: its counter is
    (j // 8, i, b * H + h, 0), and key j takes word j % 4, the upper half where j % 8 >= 4.
    """
    batch, n_head, n_query, n_key = shape
    device = seed.device
    j = torch.arange(-(-n_key // 8), device=device).view(1, 1, -1)
    i = torch.arange(n_query, device=device).view(1, -1, 1)
    bh = torch.arange(batch * n_head, device=device).view(-1, 1, 1)
    c0, c1, c2 = torch.broadcast_tensors(j, i, bh)
    words = torch.stack(philox_4x32(int(seed), (c0, c1, c2, torch.zeros_like(c0))), dim=-1)
    bits = torch.cat([words & 0xFFFF, words >> 16], dim=-1)  # (B * H, Tq, Tk / 8, 8)
    threshold = round(dropout_p * 65536)
    keep = (bits >= threshold).reshape(batch, n_head, n_query, -1)[..., :n_key]
    return keep, 1.0 - threshold / 65536
