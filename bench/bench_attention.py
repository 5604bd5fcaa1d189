"""Causal attention on packed q, k and v, forward and backward, as the model calls it: what a
provider copies to split and to gather heads is part of its time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from _op_bench import Direction, Draw, Op, Row
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgpt.kernels import reference
from fastgpt.kernels._costs import attention_pairs


def inputs(draw: Draw, B: int, T: int, H: int, D: int) -> tuple[Tensor, int]:
    return draw(B, T, 3 * H * D), H


def eager(qkv: Tensor, n_head: int) -> Tensor:
    """nanoGPT's, with SDPA. PyTorch chooses among its kernels."""
    batch, length, width = qkv.shape
    q, k, v = (
        part.view(batch, length, n_head, -1).transpose(1, 2)  # (B, H, T, D)
        for part in qkv.split(width // 3, dim=2)
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).contiguous().view(batch, length, width // 3)


def truth(qkv: Tensor, n_head: int) -> Tensor:
    """The scores of one head at a time in memory, in the backward pass too."""
    heads = zip(*(t.flatten(0, 1) for t in reference.split_heads(qkv, n_head)), strict=True)
    y = [checkpoint(_one_head, *head, use_reentrant=False) for head in heads]  # B * H of (T, D)
    batch, length, _ = qkv.shape
    return torch.stack(y).view(batch, n_head, length, -1).transpose(1, 2).flatten(2)


def _one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.attention(q[None, None], k[None, None], v[None, None])[0, 0]


def flops(direction: Direction, B: int, T: int, H: int, D: int) -> int:
    """Two products a score forward and five backward, as everywhere; our two kernels of the
    backward compute two of the five each for itself."""
    products = {"forward": 2, "backward": 5}[direction]
    return products * 2 * B * H * attention_pairs(T, T, causal=True) * D


OP = Op(
    name="attention_qkvpacked",
    inputs=inputs,
    eager=eager,
    truth=truth,
    flops=flops,
    gpu_sizes=[
        {"B": 32, "T": 1024, "H": 12, "D": 64},  # GPT-2 124M
        {"B": 16, "T": 2048, "H": 12, "D": 64},
        {"B": 8, "T": 4096, "H": 12, "D": 64},
        {"B": 4, "T": 8192, "H": 12, "D": 64},
        {"B": 2, "T": 16384, "H": 12, "D": 64},
        {"B": 8, "T": 1024, "H": 25, "D": 64},  # GPT-2 XL
        {"B": 64, "T": 256, "H": 6, "D": 64},  # nanoGPT's character model
        {"B": 32, "T": 1024, "H": 6, "D": 128},
        {"B": 8, "T": 4096, "H": 6, "D": 128},
        {"B": 2, "T": 16384, "H": 6, "D": 128},
    ],
    cpu_sizes=[{"B": 1, "T": 128, "H": 2, "D": 32}],
)


@OP.rows
def test_attention(row: Row, benchmark: Any, record_property: Any) -> None:
    row.measure(benchmark, record_property)
