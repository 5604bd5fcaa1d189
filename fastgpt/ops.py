"""The only dispatch: a CUDA tensor goes to the Triton kernels if its GPU can run them, any other to
PyTorch's own.

Same names and signatures as in ``kernels.reference``, ``kernels.torch_ops`` and ``kernels.fused``;
a model takes any of the four: ``GPT(config, ops=reference)``.
"""

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

from fastgpt import devices
from fastgpt.kernels import torch_ops
from fastgpt.kernels._checks import Recipe

_refusals: dict[int | None, str] = {}  # of each GPU, by its index


def _implementation(device: torch.device) -> ModuleType:
    if device.type != "cuda":
        return torch_ops
    if device.index not in _refusals:
        _refusals[device.index] = devices.triton_refusal(device)
    refusal = _refusals[device.index]
    if not refusal:
        from fastgpt.kernels import fused  # at the first CUDA tensor: a CPU run needs no Triton

        return fused
    if not torch.compiler.is_compiling():
        _notice(refusal)
    return torch_ops


@functools.cache
def _notice(text: str) -> None:
    """Once a process."""
    warnings.warn(text, stacklevel=4)


def dropout_seed(device: torch.device) -> Tensor | None:
    """The key of the dropout masks of one step, as int64 tensor (1,), drawn from PyTorch's
    generator. None where that generator draws every mask itself."""
    return _implementation(device).dropout_seed(device)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """See ``kernels.gelu.gelu``."""
    return _implementation(x.device).gelu(x, approximate)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """See ``kernels.layer_norm.layer_norm``."""
    return _implementation(x.device).layer_norm(x, weight, bias, eps)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    starts: Tensor | None = None,
) -> Tensor:
    """See ``kernels.attention.attention``."""
    return _implementation(q.device).attention(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        stream=stream,
        starts=starts,
    )


def attention_qkvpacked(
    qkv: Tensor,
    n_head: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    starts: Tensor | None = None,
) -> Tensor:
    """See ``kernels.attention.attention_qkvpacked``."""
    return _implementation(qkv.device).attention_qkvpacked(
        qkv,
        n_head,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        stream=stream,
        starts=starts,
    )


def attention_decode(
    qkv: Tensor, cache: Tensor, positions: Tensor, *, scale: float | None = None
) -> Tensor:
    """See ``kernels.attention_decode.attention_decode``."""
    return _implementation(qkv.device).attention_decode(qkv, cache, positions, scale=scale)


def embedding(
    idx: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    starts: Tensor | None = None,
) -> Tensor:
    """See ``kernels.embedding.embedding``."""
    return _implementation(idx.device).embedding(
        idx,
        token_weight,
        position_weight,
        dropout_p=dropout_p,
        seed=seed,
        stream=stream,
        starts=starts,
    )


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
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """See ``kernels.residual_layer_norm.residual_layer_norm``."""
    return _implementation(residual.device).residual_layer_norm(
        residual,
        delta,
        weight,
        bias,
        eps,
        delta_bias=delta_bias,
        dropout_p=dropout_p,
        seed=seed,
        stream=stream,
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recompute: Recipe | None = None,
) -> Tensor:
    """See ``kernels.linear.linear``."""
    return _implementation(x.device).linear(x, weight, bias, recompute=recompute)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    *,
    approximate: str = "none",
    recompute: Recipe | None = None,
) -> Tensor:
    """See ``kernels.mlp.mlp``."""
    return _implementation(x.device).mlp(
        x, fc_weight, fc_bias, proj_weight, approximate=approximate, recompute=recompute
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
    """See ``kernels.linear_cross_entropy.linear_cross_entropy``."""
    return _implementation(x.device).linear_cross_entropy(
        x,
        weight,
        targets,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        fp8=fp8,
    )


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
    """See ``kernels.adamw.adamw``."""
    _implementation(param.device).adamw(
        param,
        rounded,
        grad,
        exp_avg,
        exp_avg_sq,
        step,
        lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        clip=clip,
        skip=skip,
    )
