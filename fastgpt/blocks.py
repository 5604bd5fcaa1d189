"""The layers of ``GPT``, named as in nanoGPT, on the ops of ``fastgpt.ops``.

An op replaces a layer only if the layer is plain: exactly the type that was built, without hooks
and without a patched ``forward``. Any other layer is called as a module. ``Block``,
``CausalSelfAttention``, ``MLP`` and ``LayerNorm`` can also be called with x alone, as in nanoGPT.

In shape comments B is the batch size, T the sequence length, C the width ``n_embd``.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import ops as default_ops
from fastgpt.language_model import GPTConfig
from fastgpt.ops import Recompute

Attend = Callable[[Tensor], Tensor]  # qkv (B, T, 3C) → (B, T, C), called instead of attention


class Dropout:
    """The dropout masks of one forward pass. Each dropout layer gets its own offset under a common
    seed, so that masks are recomputed, not stored. Without a seed PyTorch's generator draws them.
    """

    def __init__(self, seed: Tensor | None) -> None:
        self.seed = seed
        self.next_offset = 0

    def arguments(self, module: nn.Module, p: float) -> dict[str, Any]:
        """The dropout arguments of the op that replaces ``module``; p is 0 in eval mode."""
        p = p if module.training else 0.0
        seed = self.seed if p > 0.0 else None
        self.next_offset += 1
        return dict(dropout_p=p, seed=seed, dropout_offset=self.next_offset - 1)


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward  # type: ignore[attr-defined]
    for kind in (nn.Dropout, nn.Embedding, nn.GELU, nn.Linear)
}


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module`` only runs the original ``kind.forward``, so that an op may
    replace it. Ignores global hooks (``register_module_forward_hook``, profilers).
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
    """Treat the module's current class and hooks as plain. Used after FSDP2 has replaced the class
    and added hooks, neither of which changes a result."""
    module.__dict__["_plain_as"] = type(module), _n_hooks(module.__dict__)


def _n_hooks(own: dict[str, Any]) -> int:
    return (
        len(own["_forward_hooks"])
        + len(own["_forward_pre_hooks"])
        + len(own["_backward_hooks"])
        + len(own["_backward_pre_hooks"])
    )


class Context(NamedTuple):
    """State shared by the layers in one forward pass of ``GPT``."""

    dropout: Dropout
    doc_start: Tensor | None = None  # (B, T): the position where each token's document starts
    recompute: bool = False


class Delta(NamedTuple):
    """A layer's contribution to the residual stream, ``dropout(value + bias)``, with bias and
    dropout still to be applied: the residual LayerNorm op fuses them.
    """

    value: Tensor
    bias: Tensor | None = None
    dropout: nn.Dropout | None = None  # always plain

    def materialize(self) -> Tensor:
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
        """Return ``LayerNorm(residual + delta)`` and the sum."""
        bias, drop = delta.bias, {}
        if bias is not None:  # FSDP2 casts it to half precision with the matrices of its group
            bias = bias.to(self.weight.dtype)
        if delta.dropout is not None:
            drop = dropout.arguments(delta.dropout, delta.dropout.p)
        return self._residual_layer_norm(
            residual, delta.value, self.weight, self.bias, 1e-5, delta_bias=bias, **drop
        )


def _sum_and_norm(
    norm: nn.Module | None, residual: Tensor, delta: Delta, dropout: Dropout
) -> tuple[Any, Tensor]:
    """Return ``norm(residual + delta)`` (None without ``norm``) and the sum. One op if plain."""
    if norm is not None and is_plain(norm, LayerNorm):
        return norm.of_sum(residual, delta, dropout)  # type: ignore[operator]
    residual = residual + delta.materialize()
    return None if norm is None else norm(residual), residual


def _recompute(norm: nn.Module, x: Tensor, context: Context) -> Recompute | None:
    """The arguments to recompute ``norm(x)`` in the backward, or None to save its result."""
    if context.recompute and is_plain(norm, LayerNorm):
        return x, norm.weight, norm.bias, 1e-5  # type: ignore[return-value]
    return None


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention on (B, T, C), with scale 1 / sqrt(head size)."""

    def __init__(self, config: GPTConfig, ops: ModuleType = default_ops) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # Only for nanoGPT's interface: the attention op applies dropout at the rate `dropout`.
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout
        self._linear = ops.linear
        self._attention = ops.attention_qkvpacked
        self._attention_decode = ops.attention_decode

    def forward(self, x: Tensor) -> Tensor:
        return self.delta(x, Context(Dropout(None))).materialize()

    def delta(
        self,
        x: Tensor,
        context: Context,
        recompute: Recompute | None = None,
        attend: Attend | None = None,
    ) -> Delta:
        """``self(x)`` with bias and dropout left to the residual sum, if the layers are plain.
        ``attend`` is called instead of attention."""
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
        """Attention of whole sequences. Writes their keys and values to ``cache[layer]``,
        (2, B, H, n_slots, D), allocated on first use.
        """
        heads = qkv.unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        if layer == len(cache):
            batch, n_head, _, head_size = heads.shape[1:]
            cache.append(qkv.new_zeros(2, batch, n_head, n_slots, head_size))
        cache[layer][:, :, :, : qkv.shape[1]] = heads[1:]
        return self._attention(qkv, self.n_head)

    def decode(self, cache: Tensor, positions: Tensor, qkv: Tensor) -> Tensor:
        """Attention of one new token per sequence, at its position (B,)."""
        return self._attention_decode(qkv, cache, positions)


def _projected(
    linear: Callable[..., Tensor], c_proj: nn.Module, y: Tensor, dropout: nn.Module
) -> Delta:
    if is_plain(c_proj, nn.Linear):
        return _deferred(linear(y, c_proj.weight), c_proj.bias, dropout)  # type: ignore[arg-type]
    return _deferred(c_proj(y), None, dropout)


def _deferred(value: Tensor, bias: Tensor | None, dropout: nn.Module) -> Delta:
    """Leave bias and dropout to the residual sum. A dropout that is not plain is called here."""
    if is_plain(dropout, nn.Dropout):
        return Delta(value, bias, dropout)  # type: ignore[arg-type]
    return Delta(dropout(Delta(value, bias).materialize()))


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
        return self.delta(x).materialize()

    def delta(self, x: Tensor, recompute: Recompute | None = None) -> Delta:
        """``self(x)`` with bias and dropout left to the residual sum, if the layers are plain."""
        c_fc, gelu, c_proj = self.c_fc, self.gelu, self.c_proj
        plain_fc, plain_gelu = is_plain(c_fc, nn.Linear), is_plain(gelu, nn.GELU)
        # Not for T = 1: decoding has few rows, and the matmul with the GELU epilogue has tiles of
        # 128 rows.
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
            return _deferred(y, c_proj.bias, self.dropout)
        if plain_fc:
            x = self._linear(x, c_fc.weight, c_fc.bias, recompute=recompute)
        else:
            x = c_fc(x)
        x = self._gelu(x, approximate=gelu.approximate) if plain_gelu else gelu(x)
        return _projected(self._linear, c_proj, x, self.dropout)


def _no_kernels(x: Tensor, *ops: Any) -> None:
    """Stands in for ``block_kernels`` if the module of ops has none."""


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
        """x (B, T, C) → (B, T, C). ``GPT`` passes further arguments: see ``between_norms``."""
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
        """The block applied to ``x = ln_1(residual)``. A residual sum and the LayerNorm after it
        are one op, so the block ends with the first LayerNorm of the next one.

        Returns ``next_norm(new_residual)`` (None without ``next_norm``) and the new residual.
        """
        attn, mlp, dropout = self.attn, self.mlp, context.dropout
        fused = None if attend else self._fused_block(x, residual, next_norm, context)
        if fused is not None:
            return fused
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

    def _fused_block(
        self, x: Tensor, residual: Tensor, next_norm: nn.Module | None, context: Context
    ) -> tuple[Tensor, Tensor] | None:
        """``between_norms`` as a single call, which saves most of the host overhead per op. Returns
        None if that is not possible, such as when a layer is not plain."""
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
            attn.n_head, mlp.gelu.approximate, rates, dropout.next_offset, context.recompute
        )
        shared = x, residual, layers, options, dropout.seed
        if not kernels.fits(*shared):
            return None
        dropout.next_offset += len(rates)
        norm = _recompute(self.ln_1, residual, context)
        return kernels.block(*shared, context.doc_start, norm)


for _kind in (Block, CausalSelfAttention, LayerNorm, MLP):
    _FORWARDS[_kind] = _kind.forward  # type: ignore[attr-defined]
