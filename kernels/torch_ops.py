"""The ops on PyTorch's own kernels, for devices without support for Triton: CPU, MPS, older GPUs.

Same names and signatures as in ``fused`` and ``reference``.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw as _functional_adamw

from fastgpt.kernels import _checks, chunked_loss
from fastgpt.kernels._tensors import as_matrix, autocast_dtype, unpacked
from fastgpt.kernels.reference import document_mask, each_query_head, padding_hidden, widened
from fastgpt.kernels.reference import dropout_seed as dropout_seed


def _reject_seed(seed: Tensor | None) -> None:
    if seed is not None:
        raise ValueError(
            f"seed must be None on {seed.device}: PyTorch's generator draws this mask "
            "(torch.manual_seed fixes it)"
        )


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU (Hendrycks & Gimpel 2016): ``x * Phi(x)``, or its tanh form. See ``fused.gelu``."""
    _checks.gelu(x, approximate)
    return F.gelu(x, approximate=approximate)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm (Ba et al. 2016) over the last dimension. See ``fused.layer_norm``."""
    _checks.layer_norm(x, weight, bias, eps)
    return _layer_norm(x, weight, bias, eps)


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
    """Attention by ``F.scaled_dot_product_attention``. Same arguments as ``fused.attention``, but a
    ``seed`` is an error, because PyTorch's generator draws the dropout mask.
    """
    _checks.attention(
        q, k, v, causal, scale, dropout_p, seed, dropout_offset, doc_start, key_lengths
    )
    _reject_seed(seed)
    k, v = (each_query_head(x, q.shape[1]) for x in (k, v))
    if not q.numel():  # PyTorch 2.11 divides by the number of heads and crashes
        return q @ k.mT @ v
    visible = None if doc_start is None else document_mask(doc_start)
    if key_lengths is not None:
        k, v, visible = padding_hidden(k, v, key_lengths)
        if causal:
            lower = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            visible = visible & lower
    return F.scaled_dot_product_attention(
        q, k, v, visible, dropout_p, is_causal=causal and visible is None, scale=scale
    )


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
    _, batch, n_head, n_slots, _ = cache.shape
    if not batch:
        return qkv.new_empty(0, 1, qkv.shape[2] // 3)
    heads = qkv[:, 0].unflatten(1, (3, n_head, -1)).transpose(0, 1)  # (3, B, H, D)
    q, new = heads[0], heads[1:]
    if positions.is_cpu:  # their values were checked
        first, last = map(int, positions.aminmax())
        visible = None
        if first == last:
            cache[:, :, :, last] = new
        else:
            cache[:, torch.arange(batch), :, positions] = new.transpose(0, 1)
            visible = (torch.arange(last + 1) <= positions[:, None])[:, None, None, :]
        return _attend_cached(q, cache[:, :, :, : last + 1], visible, scale)
    # The host must not wait for a GPU, so the whole cache is read.
    rows, places = torch.arange(batch, device=qkv.device), positions.clamp(0, n_slots - 1)
    inside = (positions == places)[:, None, None]
    old = cache[:, rows, :, places]  # (B, 2, H, D)
    cache[:, rows, :, places] = new.transpose(0, 1).where(inside[..., None], old)
    slots = torch.arange(n_slots, device=qkv.device)
    visible = (slots <= places[:, None])[:, None, None, :]
    return _attend_cached(q, cache, visible, scale).where(inside, math.nan)


def _attend_cached(q: Tensor, cache: Tensor, visible: Tensor | None, scale: float | None) -> Tensor:
    """q (B, H, D), keys and values (2, B, H, n, D) → (B, 1, H * D)."""
    y = F.scaled_dot_product_attention(
        q[:, :, None], cache[0], cache[1], attn_mask=visible, scale=scale
    )
    return y.transpose(1, 2).flatten(2)


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
    _reject_seed(seed)
    if doc_start is None:
        positional = position_weight.narrow(0, 0, idx.shape[1])
    else:
        places = torch.arange(idx.shape[1], dtype=torch.int32, device=idx.device)
        positional = F.embedding(places - doc_start, position_weight)
    x = F.embedding(idx, token_weight) + positional
    return F.dropout(x, dropout_p) if dropout_p > 0.0 else x


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
    _reject_seed(seed)
    total = delta
    if delta_bias is not None:
        total = total + delta_bias.to(delta.dtype)
    if dropout_p > 0.0:
        total = F.dropout(total, dropout_p)
    if total is delta or total.dtype != residual.dtype:
        total = residual + total
    else:
        total = total.add_(residual)  # in place saves a tensor; the result is the same
    return _layer_norm(total, weight, bias, eps).to(delta.dtype), total


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    weight, bias = widened(weight, bias, x.dtype)
    if x.is_cuda and x.dtype != weight.dtype and not torch.is_autocast_enabled("cuda"):
        # PyTorch's CUDA kernel requires equal dtypes.
        return F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


class _RecomputedLinear(torch.autograd.Function):
    """``F.linear`` that saves ``sources`` instead of x and recomputes x by ``rebuild``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rebuild: Callable[..., Tensor],
        *sources: Tensor | None,
    ) -> Tensor:
        ctx.rebuild, ctx.dtype, ctx.has_bias = rebuild, x.dtype, bias is not None
        ctx.save_for_backward(weight, *sources)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        weight, *sources = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        rows = as_matrix(dy)
        dweight = dbias = None
        if ctx.needs_input_grad[1]:
            dweight = rows.t() @ as_matrix(ctx.rebuild(*sources).to(ctx.dtype))
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, dweight, dbias, None, *[None] * len(sources)


def _recomputed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rebuild: Callable[..., Tensor],
    *sources: Tensor | None,
) -> Tensor:
    x = x.to(autocast_dtype(x))  # autocast does not cast a Function's inputs, nor in its backward
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if torch._C._are_functorch_transforms_active():  # they do not support this Function: x is saved
        return F.linear(x, weight, bias)
    return _RecomputedLinear.apply(x, weight, bias, rebuild, *sources)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recompute: _checks.Recompute | None = None,
) -> Tensor:
    """``x @ weight.T + bias``. See ``fused.linear``."""
    _checks.floating(x=x)
    x = x.to(autocast_dtype(x))  # before the check: weights may have that dtype already
    _checks.linear(x, weight, bias, recompute)
    if recompute is None:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight, bias)
    *sources, eps = recompute
    return _recomputed_linear(x, weight, bias, partial(_layer_norm, eps=eps), *sources)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    *,
    approximate: str = "none",
    recompute: _checks.Recompute | None = None,
) -> Tensor:
    """``linear``, GELU, ``linear`` without a bias. See ``fused.mlp``."""
    _checks.floating(x=x)
    x = x.to(autocast_dtype(x))
    _checks.mlp(x, fc_weight, fc_bias, proj_weight, approximate, recompute)
    pre = linear(x, fc_weight, fc_bias, recompute=recompute)
    act = F.gelu(pre, approximate=approximate)
    if recompute is None:
        return linear(act, proj_weight)
    return _recomputed_linear(act, proj_weight, None, partial(F.gelu, approximate=approximate), pre)


_BLOCK_LOGITS = 2**21  # logits at a time: 8 MB in float32, which stay in a CPU's cache


def _cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    want_gradient: bool,
) -> None:
    """See ``chunked_loss.RowsFunction``."""
    n_cols = logits.shape[1]
    valid = targets != ignore_index
    unknown = valid & ((targets < 0) | (targets >= n_cols))
    if unknown.is_cpu and unknown.any():  # on other devices the host would have to wait
        raise ValueError(
            f"targets must lie in [0, {n_cols}) or be ignore_index ({ignore_index}), "
            f"got {targets[unknown][0].item()}"
        )
    known = targets.where(valid & ~unknown, 0).long()
    step = max(1, _BLOCK_LOGITS // n_cols)
    for start in range(0, logits.shape[0], step):
        block = slice(start, start + step)
        tile, target = logits[block], known[block, None]
        p = torch.softmax(tile, dim=-1, dtype=losses.dtype)
        peak = tile.amax(dim=-1, keepdim=True).to(losses.dtype)
        log_sum = -p.amax(dim=-1, keepdim=True).log()  # of exp(logits - peak): max of p is 1 / sum
        log_sum.masked_fill_(unknown[block, None], math.nan)
        lse = peak + log_sum
        loss = log_sum + (1.0 - label_smoothing) * (peak - tile.gather(1, target))
        loss += z_loss * lse * lse
        if label_smoothing > 0.0:
            loss += label_smoothing * (peak - tile.mean(-1, keepdim=True, dtype=losses.dtype))
        losses[block] = loss[:, 0].where(valid[block], 0.0)
        if want_gradient:
            weight = valid[block, None].to(losses.dtype)
            p.mul_(weight * (1.0 + 2.0 * z_loss * lse))
            if label_smoothing > 0.0:
                p.sub_(weight * (label_smoothing / n_cols))
            tile.copy_(p.scatter_add_(1, target, weight * (label_smoothing - 1.0)))


_linear_cross_entropy_op = chunked_loss.define(
    "linear_cross_entropy_torch_ops",
    partial(chunked_loss.forward, _cross_entropy_rows),
)


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
    """Cross-entropy of the logits ``x @ weight.T``, never stored as a whole. Same arguments as
    ``fused.linear_cross_entropy``, but fp8 raises a ValueError, and so does a target out of range
    on the CPU."""
    _checks.linear_cross_entropy(
        x, weight, targets, ignore_index, reduction, label_smoothing, z_loss, fp8
    )
    if fp8:
        raise ValueError(
            "fp8 must be False without the Triton kernels: it needs a CUDA GPU of compute "
            f"capability 8.9 or newer (Ada, Hopper, Blackwell), got a tensor on {x.device}"
        )
    return chunked_loss.apply(
        _linear_cross_entropy_op,
        x,
        weight,
        targets,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
    )


def accumulate(totals: list[Tensor], grads: list[Tensor]) -> None:
    """``totals[i] += grads[i]``. See ``fused.accumulate``."""
    torch._foreach_add_(totals, grads)


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
    """One update with ``torch.optim.AdamW``'s fused kernel. See ``fused.adamw``."""
    _checks.adamw(
        param, rounded, grad, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay, clip, skip
    )
    _functional_adamw(
        [param],
        [grad if clip is None else grad * clip],  # grad_scale would modify grad
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        found_inf=skip,
    )
    if rounded is not None:
        rounded.copy_(param)
