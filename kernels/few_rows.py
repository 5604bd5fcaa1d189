"""A linear layer of few rows on a CPU: what decoding is made of.

    Y = X Wᵀ     X: (M, K), W: (N, K), Y: (M, N), float32, M at most MAX_ROWS

Of W every element is used M times only, so the rate at which memory hands it over bounds the time.
``F.linear`` does not reach that rate: for one row it is MKL's matrix-vector product, which reads
rows of 768 at half the rate of a sum and on one core however many it has (AMD Zen 4). NumPy's
``einsum`` reads W as it lies at the rate of a sum, on one core; oneDNN's product is better than
MKL's on several cores, and for several rows.

Bytes: 4 (N K + M K + M N). FLOPs: 2 M N K.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels._costs import KernelCost, nbytes, register_cost

MAX_ROWS = 16


# No custom_op: what that adds to a call, for gradients, is 1% of a token.
torch.library.define("fastgpt::linear_few_rows", "(Tensor x, Tensor weight) -> Tensor")


@torch.library.impl("fastgpt::linear_few_rows", "cpu")
def _linear_few_rows(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = x.detach(), weight.detach()  # NumPy takes no tensor that asks for a gradient
    if len(x) == 1 and torch.get_num_threads() == 1:
        return torch.from_numpy(np.einsum("nk,k->n", weight.numpy(), x[0].numpy()))[None]
    return F.linear(x.to_mkldnn(), weight).to_dense()


@torch.library.register_fake("fastgpt::linear_few_rows")
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0])


@register_cost(torch.ops.fastgpt.linear_few_rows)
def _(out, x, weight):
    return [KernelCost("linear", 2 * x.numel() * weight.shape[0], nbytes(x, weight, out))]


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` may be called: few rows of float32 on a CPU, no gradient wanted."""
    return (
        not torch.compiler.is_compiling()  # asked first: it would compile again for other lengths
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and 0 < x.numel() <= MAX_ROWS * x.shape[-1]
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and torch.backends.mkldnn.is_available()
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., K), (N, K) → (..., N), where ``suits``."""
    rows: Tensor = torch.ops.fastgpt.linear_few_rows(x.reshape(-1, x.shape[-1]), weight)
    return rows.view(*x.shape[:-1], weight.shape[0])
