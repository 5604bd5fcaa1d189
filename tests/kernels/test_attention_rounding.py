"""In half precision attention only rounds the 16-bit operands of its matrix products: a sharper
bound than that of PyTorch's plain op, which rounds the scores, too.
"""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.kernels import fused, reference
from tests.tools import parity


def _rounded_once(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool, scale: float
) -> list[Tensor]:
    """O, dQ, dK, dV in float32, with P, dS and O rounded to the inputs' dtype."""
    dtype = q.dtype
    q, k, v, dout = (x.float() for x in (q, k, v, dout))
    scores = q @ k.mT * scale
    if causal:
        hidden = (
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril().logical_not()
        )
        scores = scores.masked_fill(hidden, -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    probs = weights / total
    out = (weights.to(dtype).float() @ v / total).to(dtype)
    delta = (dout * out.float()).sum(-1, keepdim=True)
    dscores = (probs * (dout @ v.mT - delta)).to(dtype).float()
    dv = probs.to(dtype).float().mT @ dout
    return [out, dscores @ k * scale, dscores.mT @ q * scale, dv]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("n_queries", "n_keys"), [(129, 7), (7, 7), (64, 17), (127, 64), (129, 129)]
)
@pytest.mark.parametrize("head_size", [64, 128])
def test_only_the_operands_are_rounded(
    device: str, head_size: int, n_queries: int, n_keys: int, causal: bool
) -> None:
    case = (n_queries + head_size) // 64 + causal
    dtype = [torch.float16, torch.bfloat16][case % 2]
    shapes = [(2, 3, length, head_size) for length in (n_queries, n_keys, n_keys, n_queries)]
    q, k, v, dout = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    options: dict[str, Any] = dict(causal=causal, scale=0.3)
    kernel = partial(fused.attention, **options)
    plain = partial(reference.attention, **options)
    found = parity.results(kernel, [q, k, v], dout, dtype)
    truth = parity.results(plain, [q, k, v], dout.double(), torch.float64)
    least = [x.to(dtype).double() for x in _rounded_once(q, k, v, dout, **options)]
    for name, x, y, z in zip(("output", "dq", "dk", "dv"), found, least, truth, strict=True):
        error, allowed = ((a - z).square().mean().sqrt().item() for a in (x, y))
        assert error <= 1.1 * allowed + 1e-6, f"{name}: {error:.3g}, allowed {allowed:.3g}"
