"""Attention of one new token per sequence over a full cache, including storing the token's key and
value. It is memory-bound: each key and value is read once and used once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._ops.op_bench import BF16, FP32, Op, RandomTensors, standard_providers
from fastgpt.kernels import fused, reference
from fastgpt.kernels._tensors import split_heads


def inputs(random: RandomTensors, B: int, S: int, H: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    qkv, cache = random.normal(B, 1, 3 * H * D), random.normal(2, B, H, S, D)
    last = torch.full((B,), S - 1, device=random.device)
    return qkv.detach(), cache.detach(), last


def eager(qkv: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
    """As in gpt-fast: a static cache, with a mask for its unfilled slots."""
    q, k, v = split_heads(qkv, cache.shape[2])  # (B, H, 1, D)
    rows = torch.arange(len(positions), device=qkv.device)
    cache[0, rows, :, positions] = k[:, :, 0]
    cache[1, rows, :, positions] = v[:, :, 0]
    slots = torch.arange(cache.shape[3], device=qkv.device)
    visible = (slots <= positions[:, None])[:, None, None, :]
    y = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=visible)
    return y.transpose(1, 2).flatten(2)


def operator(qkv: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
    """The operator without the public function, which would read the positions of fake tensors."""
    out: Tensor = torch.ops.fastgpt.attention_decode(qkv, cache, positions, 1.0)
    return out


OP = Op(
    name="attention_decode",
    inputs=inputs,
    providers=standard_providers("attention_decode", eager),
    reference=reference.attention_decode,
    counted=operator,
    directions=("inference",),
    gpu_sizes=[
        {"B": 1, "S": 1024, "H": 12, "D": 64},  # GPT-2 124M
        {"B": 8, "S": 1024, "H": 12, "D": 64},
        {"B": 64, "S": 1024, "H": 12, "D": 64},
        {"B": 1, "S": 1024, "H": 25, "D": 64},  # GPT-2 XL
        {"B": 1, "S": 16384, "H": 12, "D": 64},
        {"B": 8, "S": 4096, "H": 6, "D": 128},
    ],
    cpu_sizes=[{"B": 1, "S": 256, "H": 12, "D": 64}, {"B": 4, "S": 256, "H": 12, "D": 64}],
)

test_attention_decode = OP.test()


def compiled() -> None:
    for random in (BF16, FP32):
        for head_size in (16, 25, 64, 128, 256):
            fused.attention_decode(*inputs(random, 2, 1024, 2, head_size))


COMPILED = {"attention_decode": compiled}
