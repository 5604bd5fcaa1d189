"""A transformer block and the LayerNorm after it as a single autograd node.

In eager mode each op costs the host a dispatcher call, argument checks and autograd nodes. With a
small batch or a slow host, the GPU waits for them. ``block`` calls the same launchers in the same
order, so its results are bitwise equal to those of the separate ops:

    qkv = x qkv_weightᵀ + qkv_bias                                   out = attention(qkv)
    total = residual + dropout(out attn_weightᵀ + attn_bias)         h = layer_norm(total)
    next_total = total + dropout(mlp(h) + mlp_bias)                  y = layer_norm(next_total)

All are (B, T, C) except qkv (B, T, 3C). It saves the same tensors for backward as the ops, and
moves and computes the same. It is not a PyTorch operator: the separate ops run under torch.compile,
torch.func, dispatch modes such as the FLOP counter, saved-tensor hooks (including checkpointing),
and if a layer was changed. ``fits`` tells whether it may replace them.
"""

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastgpt.kernels import _host
from fastgpt.kernels._attention import MAX_HEAD_SIZE
from fastgpt.kernels._checks import MAX_DROPOUT, Recompute
from fastgpt.kernels._operators import fill_none
from fastgpt.kernels.attention import qkvpacked_bwd, qkvpacked_fwd
from fastgpt.kernels.layer_norm import MAX_WIDTH, norm_gradients
from fastgpt.kernels.layer_norm_bwd import layer_norm_bwd
from fastgpt.kernels.layer_norm_fwd import layer_norm_fwd
from fastgpt.kernels.linear import linear_bwd, linear_fwd
from fastgpt.kernels.mlp import mlp_bwd, mlp_fwd


class Layers(NamedTuple):
    """The block's parameters. Either all biases are None, or none of them."""

    qkv_weight: Tensor  # (3C, C)
    qkv_bias: Tensor | None  # (3C)
    attn_weight: Tensor  # (C, C)
    attn_bias: Tensor | None  # (C), like the remaining vectors except fc_bias
    ln_weight: Tensor
    ln_bias: Tensor | None
    fc_weight: Tensor  # (F, C)
    fc_bias: Tensor | None  # (F)
    mlp_weight: Tensor  # (C, F)
    mlp_bias: Tensor | None
    next_ln_weight: Tensor
    next_ln_bias: Tensor | None


class Options(NamedTuple):
    """The ops' arguments that are not tensors; eps is 1e-5 for both LayerNorms."""

    n_head: int
    approximate: str = "none"
    dropout_p: tuple[float, float, float] = (0.0, 0.0, 0.0)  # in attention, after it, after the MLP
    dropout_offset: int = 0  # of attention; the other two use the next offsets
    recompute: bool = False  # recompute h and GELU's result in the backward


_EPS = 1e-5
_NO_NORM = None, None, None, 0.0  # the input of a linear layer is not recomputed


def fits(
    x: Tensor,
    residual: Tensor,
    layers: Layers,
    options: Options,
    seed: Tensor | None,
) -> bool:
    """Whether ``block`` may replace the separate ops, outside of torch.compile. False under
    dispatch modes and transforms, if only some gradients are needed, and if an op would reject, pad
    or cast its inputs."""
    if is_in_torch_dispatch_mode() or not torch.is_grad_enabled():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_function_stack():
        return False
    if torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return False
    # A checkpoint may recompute under different modes than the original forward.
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    rates = options.dropout_p
    if any(rates) and (seed is None or not all(0.0 <= rate <= MAX_DROPOUT for rate in rates)):
        return False  # without a seed, each op draws its own
    if not (x.is_cuda or _host.INTERPRETED) or type(x) is not Tensor or x.dim() != 3:
        return False
    width, dtype, device = x.shape[2], x.dtype, x.device
    head_size = width // max(1, options.n_head)
    sizes_fit = (
        x.numel() > 0
        and x.shape[1] > 1  # for one token, the MLP does not fuse GELU into an epilogue
        and width == head_size * options.n_head <= MAX_WIDTH
        and head_size % 16 == 0
        and head_size <= MAX_HEAD_SIZE
        and type(residual) is Tensor
        and residual.shape == x.shape
        and residual.device == device
        and (residual.dtype == dtype or _host.is_half(dtype))
        and dtype == _host.autocast_dtype(x)
        and options.approximate in ("none", "tanh")
    )
    return sizes_fit and _layers_fit(layers, width, dtype, device)


def _layers_fit(layers: Layers, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    hidden = layers.fc_weight.numel() // width
    shapes = (
        (3 * width, width),
        (3 * width,),
        (width, width),
        *[(width,)] * 3,
        (hidden, width),
        (hidden,),
        (width, hidden),
        *[(width,)] * 3,
    )
    dtypes = layers.qkv_weight.dtype, layers.ln_weight.dtype
    if not {*dtypes} <= {dtype, torch.float32}:
        return False
    present = [id(parameter) for parameter in layers if parameter is not None]
    if len({*present}) < len(present):  # shared: the order in which its gradients are added matters
        return False
    for name, parameter, shape in zip(Layers._fields, layers, shapes, strict=True):
        missing = name.endswith("bias") and layers.qkv_bias is None
        if (parameter is None) != missing:
            return False
        if parameter is not None and (
            type(parameter) not in (nn.Parameter, Tensor)
            or parameter.shape != shape
            or parameter.dtype != dtypes[name not in _IN_PRODUCTS]
            or parameter.device != device
            or not parameter.requires_grad
        ):
            return False
    return True


# Parameters of the matrix products; the others act on the residual stream.
_IN_PRODUCTS = {"qkv_weight", "qkv_bias", "attn_weight", "fc_weight", "fc_bias", "mlp_weight"}


def block(
    x: Tensor,
    residual: Tensor,
    layers: Layers,
    options: Options,
    seed: Tensor | None = None,
    doc_start: Tensor | None = None,
    recompute: Recompute | None = None,
) -> tuple[Tensor, Tensor]:
    """y and next_total, if ``fits`` is true for the arguments.

    Args:
        x: (B, T, C), the LayerNorm of ``residual``; float32, float16 or bfloat16.
        residual: (B, T, C).
        layers: the parameters, each of x's dtype or float32.
        options: see ``Options``.
        seed: int64 tensor (1,), the key of the dropout masks.
        doc_start: see ``attention``.
        recompute: see ``linear``, for the LayerNorm that computed x.
    """
    y, total = _Block.apply(options, seed, doc_start, recompute, x, residual, *layers)
    return y, total


_BACKWARD = SimpleNamespace(  # named like the operators
    linear_bwd=linear_bwd,
    mlp_bwd=mlp_bwd,
    attention_qkvpacked_bwd=qkvpacked_bwd,
    layer_norm_bwd=layer_norm_bwd,
)


def _backward_ops() -> Any:
    """The launchers; or the operators under torch.compile, dispatch modes and transforms, and with
    ``create_graph``, for which they raise an error."""
    traced = (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
    )
    return torch.ops.fastgpt if traced else _BACKWARD


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Options, seed: Any, doc_start: Any, norm: Any, *tensors: Any) -> Any:
        x, residual, *parameters = tensors
        p = Layers._make(parameters)
        seeds = [seed if rate > 0.0 else None for rate in o.dropout_p]
        first = o.dropout_offset
        scale = 1.0 / math.sqrt(x.shape[2] // o.n_head)

        qkv = linear_fwd(x, p.qkv_weight, p.qkv_bias, *_NO_NORM)
        attend = seeds[0], doc_start, True, scale, o.dropout_p[0], first
        out, lse = qkvpacked_fwd(qkv, o.n_head, *attend)
        delta = linear_fwd(out, p.attn_weight, None, *_NO_NORM)
        h, total, *stats = layer_norm_fwd(
            residual, delta, p.ln_weight, p.ln_bias, p.attn_bias, seeds[1], _EPS, o.dropout_p[1],
            first + 1, x.dtype,
        )  # fmt: skip
        h_source, ln_bias = (total, p.ln_bias) if o.recompute else (None, None)
        ln_weight, eps = (p.ln_weight, _EPS) if o.recompute else (None, 0.0)
        delta, pre, *act = mlp_fwd(
            h, p.fc_weight, p.fc_bias, p.mlp_weight, h_source, ln_weight, ln_bias, eps,
            o.approximate, True,
        )  # fmt: skip
        y, next_total, *next_stats = layer_norm_fwd(
            total, delta, p.next_ln_weight, p.next_ln_bias, p.mlp_bias, seeds[2], _EPS,
            o.dropout_p[2], first + 2, x.dtype,
        )  # fmt: skip

        ctx.options, ctx.attend, ctx.has_bias = o, attend[2:], p.qkv_bias is not None
        ctx.set_materialize_grads(False)  # no zeros for outputs without a consumer
        source = (x, None, None) if norm is None else norm[:3]
        ctx.eps = 0.0 if norm is None else norm[3]
        ctx.save_for_backward(
            doc_start, *seeds, *source, qkv, out, lse, total, *stats,
            None if o.recompute else h, pre, act[0] if act else None, next_total, *next_stats,
            p.qkv_weight, p.attn_weight, p.ln_weight, ln_bias,
            p.fc_weight, p.mlp_weight, p.next_ln_weight,
        )  # fmt: skip
        return y, next_total

    @staticmethod
    def backward(ctx: Any, dy: Any, dtotal: Any) -> Any:
        if dy is None and dtotal is None:
            return (*[None] * (6 + len(Layers._fields)),)
        o: Options = ctx.options
        (
            doc_start, seed, seed_1, seed_2, source, norm_weight, norm_bias, qkv, out, lse,
            total, mean, rstd, h, pre, act, next_total, next_mean, next_rstd,
            qkv_weight, attn_weight, ln_weight, ln_bias, fc_weight, mlp_weight, next_ln_weight,
        ) = ctx.saved_tensors  # fmt: skip
        has_bias, first, ops = ctx.has_bias, o.dropout_offset, _backward_ops()
        dtype = pre.dtype  # products have another if the backward runs under a different autocast

        dtotal, ddelta, *dnext_ln, dmlp_bias = norm_gradients(
            ops.layer_norm_bwd, dy, dtotal,
            (next_total, next_ln_weight, next_mean, next_rstd, seed_2),
            (o.dropout_p[2], first + 2), dtype, has_bias, has_bias,
        )  # fmt: skip
        saved, h_weight, eps = (total, ln_weight, _EPS) if o.recompute else (h, None, 0.0)
        dh, *dmlp = ops.mlp_bwd(
            ddelta, fc_weight, mlp_weight, saved, h_weight, ln_bias, pre, act, eps, o.approximate,
            has_bias, True, True, True,
        )  # fmt: skip
        dresidual, ddelta, *dln, dattn_bias = norm_gradients(
            ops.layer_norm_bwd, dh.to(dtype), dtotal, (total, ln_weight, mean, rstd, seed_1),
            (o.dropout_p[1], first + 1), dtype, has_bias, has_bias,
        )  # fmt: skip
        dout, dattn_weight = ops.linear_bwd(
            ddelta, attn_weight, out, None, None, 0.0, False, True, True
        )
        dqkv = ops.attention_qkvpacked_bwd(
            dout.to(dtype), qkv, out, lse, o.n_head, seed, doc_start, *ctx.attend
        )
        dx, *dqkv = ops.linear_bwd(
            dqkv, qkv_weight, source, norm_weight, norm_bias, ctx.eps, has_bias, True, True
        )
        return (
            None, None, None, None, dx, dresidual,
            *fill_none(dqkv, True, has_bias), dattn_weight, dattn_bias, *dln,
            *fill_none(dmlp, True, has_bias, True), dmlp_bias, *dnext_ln,
        )  # fmt: skip  # in the order of ``Layers``
