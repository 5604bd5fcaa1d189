"""The layers of ``GPT``, named as in nanoGPT, on the ops of ``fastgpt.ops``.

In the shape comments B is the batch, T the length, C the width ``n_embd``.
"""

import functools
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops as default_ops
from fastgpt.language_model import GPTConfig
from fastgpt.ops import Recipe

Attend = Callable[[Tensor], Tensor]  # qkv (B, T, 3C) → (B, T, C), in the place of attention


class Dropout:
    """The dropout of one forward pass: every place that drops has a stream of its own under one
    seed, so that no mask is ever stored. Without a seed PyTorch's generator draws the masks.
    """

    def __init__(self, seed: Tensor | None) -> None:
        self._seed = seed
        self._places = itertools.count()

    def arguments(self, module: nn.Module, p: float) -> dict[str, Any]:
        """For the op in the place of ``module``, whose mode says whether it drops."""
        p = p if module.training else 0.0
        seed = self._seed if p > 0.0 else None
        return dict(dropout_p=p, seed=seed, stream=next(self._places))


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension (``ndim``), with or without a bias; eps is 1e-5."""

    def __init__(self, ndim: int, bias: bool, ops: ModuleType = default_ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None
        self._layer_norm = ops.layer_norm
        self._residual_layer_norm = ops.residual_layer_norm

    def forward(self, x: Tensor) -> Tensor:
        return self._layer_norm(x, self.weight, self.bias, 1e-5)

    def of_sum(
        self, residual: Tensor, delta: Tensor, delta_bias: Tensor | None, dropout: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The norm of ``residual + dropout(delta + delta_bias)``, and that sum."""
        if delta_bias is not None:  # which FSDP2 rounds with the matrices of its group
            delta_bias = delta_bias.to(self.weight.dtype)
        return self._residual_layer_norm(
            residual, delta, self.weight, self.bias, 1e-5, delta_bias=delta_bias, **dropout
        )

    def recipe(self, x: Tensor) -> Recipe:
        """How to make ``self(x)`` again."""
        return x, self.weight, self.bias, 1e-5


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention on (B, T, C), with scale 1 / sqrt(head size). The bias of
    ``c_proj`` and the dropout behind it are left to the residual sum.
    """

    def __init__(self, config: GPTConfig, ops: ModuleType = default_ops) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # part of the interface only: the op drops probabilities itself, at the rate `dropout`
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout
        self._linear = ops.linear
        self._attention = ops.attention_qkvpacked
        self._attention_decode = ops.attention_decode

    def forward(
        self,
        x: Tensor,
        recompute: Recipe | None,
        dropout: Dropout,
        starts: Tensor | None,
        attend: Attend | None,
    ) -> Tensor:
        c_attn = self.c_attn
        qkv = self._linear(x, c_attn.weight, c_attn.bias, recompute=recompute)  # (B, T, 3C)
        if attend is None:
            drop = dropout.arguments(self, self.dropout)
            y = self._attention(qkv, self.n_head, starts=starts, **drop)
        else:
            y = attend(qkv)
        return self._linear(y, self.c_proj.weight)  # (B, T, C)

    def prefill(self, cache: list[Tensor], layer: int, n_slots: int, qkv: Tensor) -> Tensor:
        """Attention of whole sequences, whose keys and values go to ``cache[layer]``,
        (2, B, H, n_slots, D), which is made where there is none yet.
        """
        heads = qkv.unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        if layer == len(cache):
            batch, n_head, _, head_size = heads.shape[1:]
            cache.append(qkv.new_zeros(2, batch, n_head, n_slots, head_size))
        cache[layer][:, :, :, : qkv.shape[1]] = heads[1:]
        return self._attention(qkv, self.n_head)

    def decode(self, cache: Tensor, positions: Tensor, qkv: Tensor) -> Tensor:
        """Attention of one more token of each sequence, at its position (B,)."""
        return self._attention_decode(qkv, cache, positions)


class MLP(nn.Module):
    """Linear to 4C, GELU, Linear back to C. The bias of ``c_proj`` and the dropout behind it are
    left to the residual sum.
    """

    def __init__(
        self, config: GPTConfig, ops: ModuleType = default_ops, gelu: str = "none"
    ) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = functools.partial(ops.gelu, approximate=gelu)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self._linear = ops.linear
        self._mlp = ops.mlp
        self._approximate = gelu

    def forward(self, x: Tensor, recompute: Recipe | None) -> Tensor:
        # One token a sequence gives few rows, and the product with GELU in its epilogue computes
        # 128 at a time.
        if x.shape[1] == 1:
            x = self._linear(x, self.c_fc.weight, self.c_fc.bias, recompute=recompute)
            return self._linear(self.gelu(x), self.c_proj.weight)
        return self._mlp(
            x,
            self.c_fc.weight,
            self.c_fc.bias,
            self.c_proj.weight,
            approximate=self._approximate,
            recompute=recompute,
        )


class Block(nn.Module):
    """A pre-LayerNorm transformer block: attention, then MLP, each added to its input.

    A sum and the LayerNorm behind it are one op, so a block begins with a normalised x beside the
    residual that it was made from, and ends with the next LayerNorm.
    """

    def __init__(
        self, config: GPTConfig, ops: ModuleType = default_ops, gelu: str = "none"
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias, ops)
        self.attn = CausalSelfAttention(config, ops)
        self.ln_2 = LayerNorm(config.n_embd, config.bias, ops)
        self.mlp = MLP(config, ops, gelu)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        next_norm: LayerNorm,
        dropout: Dropout,
        recompute: bool,
        starts: Tensor | None,
        attend: Attend | None,
    ) -> tuple[Tensor, Tensor]:
        """``x`` is ``ln_1(residual)``, both (B, T, C); returns their likes for the next block.
        ``starts`` (B, T): where each token's document starts.
        """
        attn, mlp = self.attn, self.mlp
        recipe = self.ln_1.recipe(residual) if recompute else None
        delta = attn(x, recipe, dropout, starts, attend)
        drop = dropout.arguments(attn.resid_dropout, attn.resid_dropout.p)
        x, residual = self.ln_2.of_sum(residual, delta, attn.c_proj.bias, drop)
        delta = mlp(x, self.ln_2.recipe(residual) if recompute else None)
        drop = dropout.arguments(mlp.dropout, mlp.dropout.p)
        return next_norm.of_sum(residual, delta, mlp.c_proj.bias, drop)
