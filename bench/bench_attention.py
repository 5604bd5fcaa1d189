"""Causal attention on packed q, k and v, forward and backward, as the model calls it: what a
provider copies to split and to gather heads is part of its time. Sizes with an L: each sequence
holds documents of L tokens, and no token attends to another document.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench._ops.op_bench import Direction, Draw, Function, Op, Row
from fastgpt.kernels import fused, reference, torch_ops
from fastgpt.kernels.costs import attention_pairs


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


def starts(B: int, T: int, L: int) -> Tensor:
    """(B, T) of int32: where each token's document starts. The first is cut off, elsewhere in each
    sequence, as where data is cut into sequences."""
    shift = 37 * torch.arange(B)[:, None] % L
    return ((torch.arange(T) + shift) // L * L - shift).clamp(min=0).int()


def inputs_of_documents(
    draw: Draw, B: int, T: int, H: int, D: int, L: int
) -> tuple[Tensor, int, Tensor]:
    return draw(B, T, 3 * H * D), H, starts(B, T, L).to(draw.device)


def eager_of_documents(qkv: Tensor, n_head: int, starts: Tensor) -> Tensor:
    """nanoGPT's with a mask, which the call makes, as it does for each layer."""
    q, k, v = reference.split_heads(qkv, n_head)
    y = F.scaled_dot_product_attention(q, k, v, reference.document_mask(starts))
    return y.transpose(1, 2).flatten(2)


def flops_of_documents(direction: Direction, B: int, T: int, H: int, D: int, L: int) -> int:
    """Of the scores within documents."""
    pairs = int((torch.arange(T) - starts(B, T, L)).sum())
    products = {"forward": 2, "backward": 5}[direction]
    return products * 2 * H * pairs * D


class _OfDocuments(Op):
    """The third input has a name."""

    def function(self, provider: str) -> Function:
        modules = {"fused": fused, "torch_ops": torch_ops, "reference": reference}
        if provider not in modules:
            return super().function(provider)
        op = cast(Function, getattr(modules[provider], self.name))
        return lambda qkv, n_head, starts: op(qkv, n_head, starts=starts)

    def plain(self) -> Function:
        return self.function("reference")


DOCUMENTS = _OfDocuments(
    name=OP.name,
    inputs=inputs_of_documents,
    eager=eager_of_documents,
    flops=flops_of_documents,
    gpu_sizes=[
        {"B": 32, "T": 1024, "H": 12, "D": 64, "L": 256},
        {"B": 4, "T": 8192, "H": 12, "D": 64, "L": 512},
    ],
    cpu_sizes=[{"B": 1, "T": 128, "H": 2, "D": 32, "L": 48}],
)


@DOCUMENTS.rows
def test_attention_of_documents(row: Row, benchmark: Any, record_property: Any) -> None:
    row.measure(benchmark, record_property)
