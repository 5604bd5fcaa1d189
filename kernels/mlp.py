"""The MLP of a transformer block, forward and backward: two linear layers with GELU between.

    pre = x fc_weightᵀ + fc_bias        act = gelu(pre)        y = act proj_weightᵀ

x is (T, C) after flattening, fc_weight (F, C), pre and act (T, F), proj_weight (N, F), y (T, N).
Saved for backward: x, pre, act and the weights; with ``recompute`` neither x nor act.
``residual_layer_norm`` adds the bias of the second layer, since it reads y anyway.

    dpre = (dy proj_weight) * gelu'(pre)        dproj_weight = dyᵀ act
    dx = dpre fc_weight                         dfc_weight = dpreᵀ x,  dfc_bias = sum of dpre

GELU, its derivative and the sum of dpre are epilogues of the preceding products (``gemm.py``): no
separate kernel reads pre to write act, and dact is never written. FLOPs: 2 T F (C + N) forward,
twice as many backward.
"""

import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels import _checks, _host, gemm
from fastgpt.kernels._operators import differentiable, fake, fill_none, operator, wants_gradient
from fastgpt.kernels._tensors import row_count
from fastgpt.kernels.linear import (
    cast,
    recomputed,
    rows,
    saved_for_recompute,
    with_recompute,
)


def mlp_fwd(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    source: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    approximate: str,
    saves: bool,
) -> list[Tensor]:
    """y. If ``saves``, also pre and, unless it will be recomputed, act: saved for backward."""
    pre, act = gemm.linear_gelu(rows(x), cast(fc_weight, x.dtype), fc_bias, approximate)
    y = F.linear(act, cast(proj_weight, x.dtype)).view(*x.shape[:-1], proj_weight.shape[0])
    if not saves:
        return [y]
    return [y, pre, act] if source is None else [y, pre]


_mlp_op = operator("mlp")(mlp_fwd)


@fake(_mlp_op)
def _(x, fc_weight, fc_bias, proj_weight, source, ln_weight, ln_bias, eps, approximate, saves):
    y = x.new_empty(*x.shape[:-1], proj_weight.shape[0])
    hidden = (1 if source is not None else 2) if saves else 0
    n_tokens = row_count(x)
    return [y, *(x.new_empty(n_tokens, fc_weight.shape[0]) for _ in range(hidden))]


def mlp_bwd(
    dy: Tensor,
    fc_weight: Tensor,
    proj_weight: Tensor,
    saved: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    pre: Tensor,
    act: Tensor | None,
    eps: float,
    approximate: str,
    has_bias: bool,
    wants_dx: bool,
    wants_dfc: bool,
    wants_dproj: bool,
) -> list[Tensor]:
    """The wanted ones of: dx; dfc_weight, with dfc_bias if there is a bias; dproj_weight."""
    dy_rows = rows(dy)
    recompute = act is None and wants_dproj
    dpre, recomputed_act, dfc_bias = gemm.linear_gelu_gradient(
        dy_rows,
        cast(proj_weight, dy.dtype),
        pre,
        approximate,
        recompute=recompute,
        dbias_dtype=fc_weight.dtype if wants_dfc and has_bias else None,
    )
    act = recomputed_act if recompute else act
    gradients = []
    if wants_dx:
        gradients.append((dpre @ cast(fc_weight, dy.dtype)).view(saved.shape))
    if wants_dfc:
        x = recomputed(saved, ln_weight, ln_bias, eps, dy.dtype)
        gradients.append(gemm.weight_gradient(dpre, rows(x), False, fc_weight.dtype)[0])
        gradients += [] if dfc_bias is None else [dfc_bias]
    if wants_dproj:
        assert act is not None
        gradients.append(gemm.weight_gradient(dy_rows, act, False, proj_weight.dtype)[0])
    return gradients


_mlp_bwd_op = operator("mlp_bwd")(mlp_bwd)


@fake(_mlp_bwd_op)
def _(
    dy, fc_weight, proj_weight, saved, ln_weight, ln_bias, pre, act, eps, approximate,
    has_bias, wants_dx, wants_dfc, wants_dproj,
):  # fmt: skip
    gradients = [dy.new_empty(saved.shape)] if wants_dx else []
    if wants_dfc:
        gradients.append(fc_weight.new_empty(fc_weight.shape))
        gradients += [fc_weight.new_empty(fc_weight.shape[0])] if has_bias else []
    return gradients + ([proj_weight.new_empty(proj_weight.shape)] if wants_dproj else [])


def _setup_context(ctx, inputs, output):
    x, fc_weight, fc_bias, proj_weight, *norm_arguments, ctx.eps, ctx.approximate, _ = inputs
    _, pre, *act = output
    ctx.save_for_backward(
        fc_weight,
        proj_weight,
        *saved_for_recompute(x, *norm_arguments),
        pre,
        act[0] if act else None,
    )
    ctx.has_bias = fc_bias is not None
    ctx.set_materialize_grads(False)  # do not allocate zeros for the gradients of pre and act


def _backward(ctx, dy, *_):
    if dy is None:
        return ()
    wants_dx, wants_dfc_weight, wants_dfc_bias, wants_dproj, *_ = ctx.needs_input_grad
    wants_dfc = wants_dfc_weight or wants_dfc_bias
    wanted = wants_dx, wants_dfc, wants_dproj
    gradients = _mlp_bwd_op(dy, *ctx.saved_tensors, ctx.eps, ctx.approximate, ctx.has_bias, *wanted)
    return fill_none(gradients, wants_dx, wants_dfc, wants_dfc and ctx.has_bias, wants_dproj)


differentiable(_mlp_op, _backward, _setup_context)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    *,
    approximate: str = "none",
    recompute: _checks.Recompute | None = None,
) -> Tensor:
    """``linear(gelu(linear(x, fc_weight, fc_bias)), proj_weight)``, with GELU in the epilogue of
    the first product, and its derivative in the epilogue of the product for its gradient.

    Args:
        x: (..., C), any strides; float32, float16 or bfloat16, on a CUDA device. Cast to
            autocast's dtype under autocast.
        fc_weight: (F, C), of x's dtype or float32; rounded to x's dtype.
        fc_bias: (F,), of fc_weight's dtype, or None.
        proj_weight: (N, F), of fc_weight's dtype.
        approximate: "none" for the exact GELU, "tanh" for the form GPT-2 was trained with.
        recompute: ``(x, weight, bias, eps)`` of the ``layer_norm`` that computed x. Its input is
            saved anyway, and the backward recomputes x and GELU's result from it.

    Returns:
        (..., N) of x's dtype, contiguous. Sums, GELU and the parameter gradients are computed in
        float32 and rounded once.

    Raises:
        TypeError: an argument is not a floating-point tensor, or has an unsupported dtype.
        ValueError: shapes, dtypes or devices do not match, or ``approximate`` is neither.
    """
    _checks.floating(x=x)
    x = x.to(_host.autocast_dtype(x))
    _checks.mlp(x, fc_weight, fc_bias, proj_weight, approximate, recompute)
    _host.launchable(x=x, fc_weight=fc_weight, fc_bias=fc_bias, proj_weight=proj_weight)
    saves = wants_gradient(x, fc_weight, fc_bias, proj_weight)
    norm_arguments = with_recompute(recompute)
    return _mlp_op(x, fc_weight, fc_bias, proj_weight, *norm_arguments, approximate, saves)[0]
