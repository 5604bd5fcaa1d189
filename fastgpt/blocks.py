"""The layers of ``GPT``, named as in nanoGPT, on the ops of ``fastgpt.ops``.

Ops take the place of layers only where the layers are plain: of exactly the type that was built,
with no hook and no patched ``forward``. A layer that was replaced, wrapped, hooked or patched is
called. ``Block``, ``CausalSelfAttention``, ``MLP`` and ``LayerNorm`` may be called as in nanoGPT,
with x alone.

In the shape comments B is the batch, T the length, C the width ``n_embd``.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import ops as default_ops
from fastgpt.language_model import GPTConfig
from fastgpt.ops import Recompute

Attend = Callable[[Tensor], Tensor]  # qkv (B, T, 3C) → (B, T, C), in the place of attention


class Dropout:
    """The dropout of one forward pass: every place that drops has an offset of its own under one
    seed, so that no mask is ever stored. Without a seed PyTorch's generator draws the masks.
    """

    def __init__(self, seed: Tensor | None) -> None:
        self.seed = seed
        self.place = 0  # the offset of the next place

    def arguments(self, module: nn.Module, p: float) -> dict[str, Any]:
        """For the op in the place of ``module``, whose mode says whether it drops."""
        p = p if module.training else 0.0
        seed = self.seed if p > 0.0 else None
        self.place += 1
        return dict(dropout_p=p, seed=seed, dropout_offset=self.place - 1)


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward  # type: ignore[attr-defined]
    for kind in (nn.Dropout, nn.Embedding, nn.GELU, nn.Linear)
}


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module`` does what ``kind`` does and nothing more, so that an op may take
    its place. Hooks for all modules (``register_module_forward_hook``, profilers) do not count.
    """
    own = module.__dict__
    expected, n_hooks = own.get("_plain_as", (kind, 0))
    return (
        type(module) is expected
        and "forward" not in own
        and kind.forward is _FORWARDS[kind]
        and n_hooks == _n_hooks(own)
    )


def keep_plain(module: nn.Module) -> None:
    """Count the module's present class and hooks as plain: FSDP2's, which change no result."""
    module.__dict__["_plain_as"] = type(module), _n_hooks(module.__dict__)


def _n_hooks(own: dict[str, Any]) -> int:
    return (
        len(own["_forward_hooks"])
        + len(own["_forward_pre_hooks"])
        + len(own["_backward_hooks"])
        + len(own["_backward_pre_hooks"])
    )


class Context(NamedTuple):
    """What the layers of one forward pass of ``GPT`` share."""

    dropout: Dropout
    doc_start: Tensor | None = None  # (B, T): where each token's document starts
    recompute: bool = False


class Delta(NamedTuple):
    """What a layer adds to the residual stream: ``dropout(value + bias)``."""

    value: Tensor
    bias: Tensor | None = None
    dropout: nn.Dropout | None = None  # a plain one, or none is left to be done

    def dropped(self) -> Tensor:
        value = self.value if self.bias is None else self.value + self.bias
        return value if self.dropout is None else self.dropout(value)


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

    def of_sum(self, residual: Tensor, delta: Delta, dropout: Dropout) -> tuple[Tensor, Tensor]:
        """The norm of ``residual`` plus ``delta``, and that sum."""
        bias, drop = delta.bias, {}
        if bias is not None:  # FSDP2 rounds it with the matrices of its group
            bias = bias.to(self.weight.dtype)
        if delta.dropout is not None:
            drop = dropout.arguments(delta.dropout, delta.dropout.p)
        return self._residual_layer_norm(
            residual, delta.value, self.weight, self.bias, 1e-5, delta_bias=bias, **drop
        )


def _sum_and_norm(
    norm: nn.Module | None, residual: Tensor, delta: Delta, dropout: Dropout
) -> tuple[Any, Tensor]:
    """``residual`` plus ``delta``, behind its norm (None without ``norm``): one op for ours."""
    if norm is not None and is_plain(norm, LayerNorm):
        return norm.of_sum(residual, delta, dropout)  # type: ignore[operator]
    residual = residual + delta.dropped()
    return None if norm is None else norm(residual), residual


def _recompute(norm: nn.Module, x: Tensor, context: Context) -> Recompute | None:
    """How to compute ``norm(x)`` again in the backward, where that is wanted and known."""
    if context.recompute and is_plain(norm, LayerNorm):
        return x, norm.weight, norm.bias, 1e-5  # type: ignore[return-value]
    return None


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention on (B, T, C), with scale 1 / sqrt(head size)."""

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

    def forward(self, x: Tensor) -> Tensor:
        return self.delta(x, Context(Dropout(None))).dropped()

    def delta(
        self,
        x: Tensor,
        context: Context,
        recompute: Recompute | None = None,
        attend: Attend | None = None,
    ) -> Delta:
        """``self(x)``, whose bias and dropout are left to the residual sum where they are plain.
        ``attend`` takes the place of attention."""
        c_attn = self.c_attn
        if is_plain(c_attn, nn.Linear):
            qkv = self._linear(x, c_attn.weight, c_attn.bias, recompute=recompute)  # (B, T, 3C)
        else:
            qkv = c_attn(x)
        if attend is None:
            drop = context.dropout.arguments(self, self.dropout)
            y = self._attention(qkv, self.n_head, doc_start=context.doc_start, **drop)
        else:
            y = attend(qkv)
        return _projected(self._linear, self.c_proj, y, self.resid_dropout)  # (B, T, C)

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


def _projected(
    linear: Callable[..., Tensor], c_proj: nn.Module, y: Tensor, dropout: nn.Module
) -> Delta:
    if is_plain(c_proj, nn.Linear):
        return _left(linear(y, c_proj.weight), c_proj.bias, dropout)  # type: ignore[arg-type]
    return _left(c_proj(y), None, dropout)


def _left(value: Tensor, bias: Tensor | None, dropout: nn.Module) -> Delta:
    """Bias and dropout to the residual sum, unless the dropout has to be called."""
    if is_plain(dropout, nn.Dropout):
        return Delta(value, bias, dropout)  # type: ignore[arg-type]
    return Delta(dropout(Delta(value, bias).dropped()))


class MLP(nn.Module):
    """Linear to 4C, GELU, Linear back to C."""

    def __init__(
        self, config: GPTConfig, ops: ModuleType = default_ops, gelu: str = "none"
    ) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=gelu)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self._linear = ops.linear
        self._gelu = ops.gelu
        self._mlp = ops.mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.delta(x).dropped()

    def delta(self, x: Tensor, recompute: Recompute | None = None) -> Delta:
        """``self(x)``, whose bias and dropout are left to the residual sum where they are plain."""
        c_fc, gelu, c_proj = self.c_fc, self.gelu, self.c_proj
        plain_fc, plain_gelu = is_plain(c_fc, nn.Linear), is_plain(gelu, nn.GELU)
        # One token a sequence gives few rows, and the product with GELU in its epilogue computes
        # 128 at a time.
        together = x.shape[-2] > 1 and plain_fc and plain_gelu and is_plain(c_proj, nn.Linear)
        if together and c_fc.weight.dtype == c_proj.weight.dtype:
            y = self._mlp(
                x,
                c_fc.weight,
                c_fc.bias,
                c_proj.weight,
                approximate=gelu.approximate,
                recompute=recompute,
            )
            return _left(y, c_proj.bias, self.dropout)
        if plain_fc:
            x = self._linear(x, c_fc.weight, c_fc.bias, recompute=recompute)
        else:
            x = c_fc(x)
        x = self._gelu(x, approximate=gelu.approximate) if plain_gelu else gelu(x)
        return _projected(self._linear, c_proj, x, self.dropout)


def _no_kernels(x: Tensor, *ops: Any) -> None:
    """In place of ``block_kernels`` in a module of ops without it."""


class Block(nn.Module):
    """A pre-LayerNorm transformer block: attention, then MLP, each added to its input."""

    def __init__(
        self, config: GPTConfig, ops: ModuleType = default_ops, gelu: str = "none"
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias, ops)
        self.attn = CausalSelfAttention(config, ops)
        self.ln_2 = LayerNorm(config.n_embd, config.bias, ops)
        self.mlp = MLP(config, ops, gelu)
        self._block_kernels = getattr(ops, "block_kernels", _no_kernels)

    def forward(self, x: Tensor, *fused: Any) -> Any:
        """x (B, T, C) → its like. ``GPT`` passes more: see ``between_norms``."""
        if fused:
            return self.between_norms(x, *fused)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

    def between_norms(
        self,
        x: Tensor,
        residual: Tensor,
        next_norm: nn.Module | None,
        context: Context,
        attend: Attend | None,
    ) -> tuple[Any, Tensor]:
        """The block on ``x``, which is ``ln_1(residual)``: a sum and the LayerNorm behind it are
        one op, so it ends with that of the next block.

        Returns ``next_norm`` of the new residual (None without one), and the new residual.
        """
        attn, mlp, dropout = self.attn, self.mlp, context.dropout
        together = None if attend else self._together(x, residual, next_norm, context)
        if together is not None:
            return together
        if is_plain(attn, CausalSelfAttention):
            delta = attn.delta(x, context, _recompute(self.ln_1, residual, context), attend)
        else:
            delta = Delta(attn(x))
        x, residual = _sum_and_norm(self.ln_2, residual, delta, dropout)
        if is_plain(mlp, MLP):
            delta = mlp.delta(x, _recompute(self.ln_2, residual, context))
        else:
            delta = Delta(mlp(x))
        return _sum_and_norm(next_norm, residual, delta, dropout)

    def _together(
        self, x: Tensor, residual: Tensor, next_norm: nn.Module | None, context: Context
    ) -> tuple[Tensor, Tensor] | None:
        """``between_norms`` in one call, which spares the host most of its work for the ops; None
        where that is not possible, or a layer is not plain."""
        if next_norm is None or torch.compiler.is_compiling():
            return None
        attn, ln_2, mlp = self.attn, self.ln_2, self.mlp
        if not (
            is_plain(attn, CausalSelfAttention)
            and is_plain(mlp, MLP)
            and all(is_plain(norm, LayerNorm) for norm in (ln_2, next_norm))
        ):
            return None
        if ln_2._residual_layer_norm is not next_norm._residual_layer_norm:  # type: ignore
            return None
        kernels = self._block_kernels(
            x, attn._linear, attn._attention, mlp._mlp, ln_2._residual_layer_norm
        )
        if kernels is None:
            return None
        c_attn, attn_proj, c_fc, mlp_proj = attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj
        drops = attn.resid_dropout, mlp.dropout
        if not (
            all(is_plain(layer, nn.Linear) for layer in (c_attn, attn_proj, c_fc, mlp_proj))
            and all(is_plain(drop, nn.Dropout) for drop in drops)
            and is_plain(mlp.gelu, nn.GELU)
        ):
            return None
        layers = kernels.Layers(
            *(c_attn.weight, c_attn.bias, attn_proj.weight, attn_proj.bias),
            *(ln_2.weight, ln_2.bias, c_fc.weight, c_fc.bias, mlp_proj.weight, mlp_proj.bias),
            *(next_norm.weight, next_norm.bias),
        )
        dropout = context.dropout
        rates = (
            attn.dropout if attn.training else 0.0,
            *(d.p if d.training else 0.0 for d in drops),
        )
        options = kernels.Options(
            attn.n_head, mlp.gelu.approximate, rates, dropout.place, context.recompute
        )
        shared = x, residual, layers, options, dropout.seed
        if not kernels.fits(*shared):
            return None
        dropout.place += len(rates)
        norm = _recompute(self.ln_1, residual, context)
        return kernels.block(*shared, context.doc_start, norm)


for _kind in (Block, CausalSelfAttention, LayerNorm, MLP):
    _FORWARDS[_kind] = _kind.forward  # type: ignore[attr-defined]
