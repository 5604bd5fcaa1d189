"""Baselines for fastgpt, on the parameters of a ``fastgpt.GPT``: nanoGPT's forward pass in eager
PyTorch, and Hugging Face's GPT-2.

nanoGPT's forward pass is a function and not a module of ops for ``GPT``, because ``GPT`` leaves the
biases of its projections and the loss to fused ops, which would change the PyTorch baseline.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import GPT

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # q, k, v (B, H, T, D), dropout → y
Norm = Callable[[Any, Tensor], Tensor]  # layer with weight and bias, x (..., C) → y


def loss(gpt: GPT, idx: Tensor, targets: Tensor, attention: Attention) -> Tensor:
    """Mean cross-entropy of ``targets`` (B, T) given ``idx`` (B, T)."""
    logits = _linear(gpt.lm_head, _hidden(gpt, idx, attention, _norm))  # (B, T, V)
    return F.cross_entropy(
        _wide(logits).view(-1, gpt.config.vocab_size), targets.view(-1), ignore_index=-1
    )


def chunked_loss(gpt: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    """``loss`` with SDPA, and with PyTorch 2.13's chunked op for head and cross-entropy."""
    hidden = _hidden(gpt, idx, sdpa, _norm).flatten(0, 1)
    weight = gpt.lm_head.weight
    if torch.is_autocast_enabled(hidden.device.type):  # autocast does not cover the op
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return F.linear_cross_entropy(  # type: ignore[attr-defined]  # of PyTorch 2.13
        hidden,
        weight,
        targets.flatten(),
        ignore_index=-1,
        options=nn.LinearCrossEntropyOptions(),  # type: ignore[attr-defined]
    )


def liger_loss(gpt: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    """``loss`` with SDPA, and with Liger-Kernel's LayerNorm and fused head and cross-entropy. As
    with its patches, these receive the float32 residual stream and float32 weights, and under
    autocast the products inside are in its dtype."""
    from liger_kernel.transformers.functional import (
        liger_fused_linear_cross_entropy,
        liger_layer_norm,
    )

    def norm(layer: Any, x: Tensor) -> Any:
        return liger_layer_norm(x, layer.weight, layer.bias, 1e-5)

    hidden = _hidden(gpt, idx, sdpa, norm).flatten(0, 1)
    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden, gpt.lm_head.weight, targets.flatten(), ignore_index=-1
    )
    return loss


def last_logits(gpt: GPT, idx: Tensor, attention: Attention) -> Tensor:
    """The logits (B, V) of the token after ``idx`` (B, T)."""
    return _linear(gpt.lm_head, _hidden(gpt, idx, attention, _norm)[:, -1])


def sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def naive(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Attention with all scores in memory."""
    length = q.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(q.shape[3]))  # (B, H, T, T)
    scores = scores.masked_fill(~visible, -math.inf)
    return F.dropout(F.softmax(_wide(scores), dim=-1), dropout) @ v


def _hidden(gpt: GPT, idx: Tensor, attention: Attention, norm: Norm) -> Tensor:
    dropout = gpt.config.dropout if gpt.training else 0.0
    trunk: Any = gpt.transformer
    positions = torch.arange(idx.shape[1], device=idx.device)  # (T)
    x = F.embedding(idx, trunk.wte.weight) + F.embedding(positions, trunk.wpe.weight)
    x = F.dropout(x, dropout)  # (B, T, C)
    for block in trunk.h:
        x = x + _attend(block.attn, norm(block.ln_1, x), attention, dropout)
        h = F.gelu(_linear(block.mlp.c_fc, norm(block.ln_2, x)))  # (B, T, 4C)
        x = x + F.dropout(_linear(block.mlp.c_proj, h), dropout)
    return norm(trunk.ln_f, x)


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
    """x in float32 under autocast. CUDA's autocast casts the input of a softmax, LayerNorm or loss
    to float32; the CPU's, which ``roofline.py`` uses, does not."""
    return x.float() if torch.is_autocast_enabled(x.device.type) else x


# ----------------------------------------------------------------------------------- Hugging Face

# Hugging Face stores these as (in, out), nn.Linear as (out, in).
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def huggingface_model(gpt: GPT) -> nn.Module:
    """Hugging Face's GPT-2 with the same weights, on the same device, with exact GELU and SDPA."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = gpt.config
    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        activation_function="gelu",
        resid_pdrop=c.dropout,
        embd_pdrop=c.dropout,
        attn_pdrop=c.dropout,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    model: Any = GPT2LMHeadModel(config)
    model.load_state_dict(
        {
            name: weight.t() if name.endswith(_TRANSPOSED) else weight
            for name, weight in gpt.state_dict().items()
        }
    )
    return model.to(gpt.lm_head.weight.device)


def huggingface_loss(model: Any, idx: Tensor, targets: Tensor) -> Tensor:
    """As ``loss``."""
    logits = model(idx).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
