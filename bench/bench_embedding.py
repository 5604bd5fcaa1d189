"""Token plus position embedding, forward and backward with the gradients of both tables."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._ops.op_bench import BF16, FP32, Op, RandomTensors, standard_providers
from fastgpt.kernels import fused, reference


def inputs(random: RandomTensors, B: int, T: int, C: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    return random.ids(V, B, T), random.normal(V, C, std=0.02), random.normal(T, C, std=0.02)


def eager(idx: Tensor, token_weight: Tensor, position_weight: Tensor) -> Tensor:
    positions = torch.arange(idx.shape[1], device=idx.device)  # (T)
    return F.embedding(idx, token_weight) + F.embedding(positions, position_weight)


OP = Op(
    name="embedding",
    inputs=inputs,
    providers=standard_providers("embedding", eager),
    reference=reference.embedding,
    gpu_sizes=[
        {"B": 32, "T": 1024, "C": 768, "V": 50304},  # GPT-2 124M
        {"B": 32, "T": 1024, "C": 768, "V": 50257},
        {"B": 8, "T": 1024, "C": 1600, "V": 50304},  # GPT-2 XL
        {"B": 64, "T": 256, "C": 384, "V": 65},  # nanoGPT's character model
    ],
    cpu_sizes=[{"B": 2, "T": 128, "C": 128, "V": 65}],
    small={"B": 2, "T": 33, "C": 96, "V": 65},
)

test_embedding = OP.test()


def compiled() -> None:
    """Every tile; an odd width and GPT-2's also with documents and dropout."""
    launches = [(BF16, 768, True, 0.1), (FP32, 768, True, 0.1), (FP32, 65, True, 0.1)]
    launches += [(FP32, width, False, 0.1) for width in (32, 64, 200, 384)]
    launches += [(BF16, 768, False, 0.0), (BF16, 768, False, 0.1), (FP32, 768, True, 0.0)]
    for random, width, documents, p in launches:
        idx, token, position = inputs(random, 2, 64, width, 96)
        doc_start = torch.zeros_like(idx, dtype=torch.int32) if documents else None
        fused.embedding(idx, token, position, dropout_p=p, doc_start=doc_start).sum().backward()


COMPILED = {"embedding": compiled}
