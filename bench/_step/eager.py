"""nanoGPT's forward pass in eager PyTorch: the baselines of ``run.py``, ``roofline.py`` and
``bench_decode.py``.

A function of a ``fastgpt.GPT``'s parameters, not a module of ops for it: ``GPT`` leaves the biases
of its projections and the loss to fused ops, and those would change what PyTorch does here.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import GPT

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # q, k, v (B, H, T, D), dropout → y


def loss(gpt: GPT, idx: Tensor, targets: Tensor, attention: Attention) -> Tensor:
    """The mean cross-entropy of ``targets`` (B, T) after ``idx`` (B, T)."""
    logits = _linear(gpt.lm_head, _hidden(gpt, idx, attention))  # (B, T, V)
    return F.cross_entropy(
        _wide(logits).view(-1, gpt.config.vocab_size), targets.view(-1), ignore_index=-1
    )


def last_logits(gpt: GPT, idx: Tensor, attention: Attention) -> Tensor:
    """Those of the token behind ``idx`` (B, T): (B, V)."""
    return _linear(gpt.lm_head, _hidden(gpt, idx, attention)[:, -1])


def _hidden(gpt: GPT, idx: Tensor, attention: Attention) -> Tensor:
    dropout = gpt.config.dropout if gpt.training else 0.0
    trunk: Any = gpt.transformer
    positions = torch.arange(idx.shape[1], device=idx.device)  # (T)
    x = F.embedding(idx, trunk.wte.weight) + F.embedding(positions, trunk.wpe.weight)
    x = F.dropout(x, dropout)  # (B, T, C)
    for block in trunk.h:
        x = x + _attend(block.attn, _norm(block.ln_1, x), attention, dropout)
        h = F.gelu(_linear(block.mlp.c_fc, _norm(block.ln_2, x)))  # (B, T, 4C)
        x = x + F.dropout(_linear(block.mlp.c_proj, h), dropout)
    return _norm(trunk.ln_f, x)


def sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def naive(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """With every score stored."""
    length = q.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(q.shape[3]))  # (B, H, T, T)
    scores = scores.masked_fill(~visible, -math.inf)
    return F.dropout(F.softmax(_wide(scores), dim=-1), dropout) @ v


def _attend(attn: Any, x: Tensor, attention: Attention, dropout: float) -> Tensor:
    batch, length, width = x.shape
    q, k, v = (
        part.view(batch, length, attn.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        for part in _linear(attn.c_attn, x).split(width, dim=2)
    )
    y = attention(q, k, v, dropout).transpose(1, 2).contiguous().view(batch, length, width)
    return F.dropout(_linear(attn.c_proj, y), dropout)


def _linear(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _norm(layer: Any, x: Tensor) -> Tensor:
    return F.layer_norm(_wide(x), layer.weight.shape, layer.weight, layer.bias, 1e-5)


def _wide(x: Tensor) -> Tensor:
    """x as CUDA's autocast hands it to a softmax, a LayerNorm or a loss: in float32. CPU's, in
    which ``roofline.py`` runs, would leave it as it is."""
    return x.float() if torch.is_autocast_enabled(x.device.type) else x
