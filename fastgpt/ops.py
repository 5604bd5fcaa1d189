"""The only dispatch: a CUDA tensor goes to the Triton kernels, any other to PyTorch's own.

Same names and signatures as in ``kernels.reference``, ``kernels.portable`` and ``kernels.fused``;
a model takes any of the four: ``GPT(config, ops=reference)``.
"""

import importlib.util
import warnings
from types import ModuleType

from torch import Tensor

from fastgpt.kernels import portable

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _implementation(x: Tensor) -> ModuleType:
    if not x.is_cuda:
        return portable
    if not _HAS_TRITON:
        warnings.warn(
            "Triton is not installed (pip install triton): CUDA tensors run on PyTorch's kernels",
            stacklevel=3,
        )
        return portable
    from fastgpt.kernels import fused  # at the first CUDA tensor: a CPU run needs no Triton

    return fused


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """See ``kernels.gelu.gelu``."""
    return _implementation(x).gelu(x, approximate)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """See ``kernels.layer_norm.layer_norm``."""
    return _implementation(x).layer_norm(x, weight, bias, eps)


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
    """See ``kernels.attention.attention``."""
    return _implementation(q).attention(
        q, k, v, causal=causal, scale=scale, dropout_p=dropout_p, seed=seed
    )


def attention_qkvpacked(
    qkv: Tensor,
    n_head: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """See ``kernels.attention.attention_qkvpacked``."""
    return _implementation(qkv).attention_qkvpacked(
        qkv, n_head, causal=causal, scale=scale, dropout_p=dropout_p, seed=seed
    )
