"""The ops on PyTorch's own kernels: for the CPU, MPS and whatever has no Triton.

Same names and signatures as in ``fused`` and ``reference``.
"""

import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels import _checks
from fastgpt.kernels.reference import unpacked


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU (Hendrycks & Gimpel 2016): ``x * Phi(x)``, or its tanh form. See ``fused.gelu``."""
    _checks.gelu(x, approximate)
    return F.gelu(x, approximate=approximate)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm (Ba et al. 2016) over the last dimension. See ``fused.layer_norm``."""
    _checks.layer_norm(x, weight, bias, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


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
    """Attention by ``F.scaled_dot_product_attention``. Same arguments as ``fused.attention``, but
    PyTorch's generator alone draws the dropout mask here: a ``seed`` is refused.
    """
    _checks.attention(q, k, v, scale, dropout_p, seed)
    if seed is not None:
        raise ValueError(
            f"seed must be None on {q.device}: PyTorch's generator draws this mask "
            "(torch.manual_seed fixes it)"
        )
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, dropout_p=dropout_p
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
    """The same on packed (B, T, 3C), giving (B, T, C). See ``fused.attention_qkvpacked``."""
    return unpacked(attention, qkv, n_head, causal, scale, dropout_p, seed)
