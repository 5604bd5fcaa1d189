"""Causal attention on packed q, k and v, forward and backward, as the model calls it: a provider's
time includes its copies to split and merge heads. Sizes with an L: each sequence holds documents of
L tokens, and no token attends to another document.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench._ops.op_bench import BF16, FP16, FP32, Direction, Function, Op, RandomTensors
from fastgpt.kernels import fused, reference, torch_ops
from fastgpt.kernels._tensors import split_heads
from fastgpt.kernels.costs import attention_pairs


def inputs(
    random: RandomTensors, B: int, T: int, H: int, D: int, L: int = 0
) -> tuple[Tensor, int, Tensor | None]:
    starts = doc_start(B, T, L).to(random.device) if L else None
    return random.normal(B, T, 3 * H * D), H, starts


def doc_start(B: int, T: int, L: int) -> Tensor:
    """(B, T) int32: the start of each token's document. Each sequence begins elsewhere in its first
    document, as if cut from a stream of documents."""
    shift = 37 * torch.arange(B)[:, None] % L
    return ((torch.arange(T) + shift) // L * L - shift).clamp(min=0).int()


def of(module: ModuleType) -> Function:
    """A module's op as a provider."""
    return lambda qkv, n_head, starts: module.attention_qkvpacked(qkv, n_head, doc_start=starts)


def eager(qkv: Tensor, n_head: int, starts: Tensor | None) -> Tensor:
    """nanoGPT's attention by SDPA, for which PyTorch chooses the kernel. Every call builds the mask
    of documents, as every layer would."""
    q, k, v = split_heads(qkv, n_head)  # (B, H, T, D)
    mask = None if starts is None else reference.document_mask(starts)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    return y.transpose(1, 2).flatten(2)


def plain(qkv: Tensor, n_head: int, starts: Tensor | None) -> Tensor:
    """The reference op. Without documents, only one head's scores are in memory at a time, also in
    the backward."""
    if starts is not None:
        return reference.attention_qkvpacked(qkv, n_head, doc_start=starts)
    heads = zip(*(t.flatten(0, 1) for t in split_heads(qkv, n_head)), strict=True)
    y = [checkpoint(_one_head, *head, use_reentrant=False) for head in heads]  # B * H of (T, D)
    batch, length, _ = qkv.shape
    return torch.stack(y).view(batch, n_head, length, -1).transpose(1, 2).flatten(2)


def _one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.attention(q[None, None], k[None, None], v[None, None])[0, 0]


def flops(direction: Direction, B: int, T: int, H: int, D: int, L: int = 0) -> int:
    """FLOPs of the scores within documents: two products per score forward and five backward,
    although our backward computes two of the five twice."""
    pairs = B * attention_pairs(T, T, causal=True)
    if L:
        pairs = int((torch.arange(T) - doc_start(B, T, L)).sum())
    return {"forward": 2, "backward": 5}[direction] * 2 * H * pairs * D


OP = Op(
    name="attention_qkvpacked",
    inputs=inputs,
    providers={"fused": of(fused), "torch_ops": of(torch_ops), "eager": eager, "compile": eager},
    reference=plain,
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
        {"B": 32, "T": 1024, "H": 12, "D": 64, "L": 256},
        {"B": 4, "T": 8192, "H": 12, "D": 64, "L": 512},
    ],
    cpu_sizes=[
        {"B": 1, "T": 128, "H": 2, "D": 32},
        {"B": 1, "T": 128, "H": 2, "D": 32, "L": 48},
    ],
    small={"B": 2, "T": 161, "H": 2, "D": 64},
)

test_attention = OP.test()


# For the compile gate: (documents, dropout). With the same tile, dropout needs more registers than
# no dropout, and head size 80 as many as 128. Documents may need more or fewer, so half precision,
# whose forward is near the limit, is also compiled without them.
_PLAIN, _DROPOUT, _DOCUMENTS, _BOTH = (False, 0.0), (False, 0.1), (True, 0.0), (True, 0.1)
Combination = tuple[RandomTensors, int, tuple[bool, float]]  # dtype, head size, options as above


def compiled(*both: Combination, forward: Sequence[Combination] = ()) -> None:
    """Compile ``both`` in both directions, and ``forward`` only forward, because its backward's
    tiles are those of other combinations."""
    for combinations, backward in ((both, True), (forward, False)):
        for random, head_size, (documents, p) in combinations:
            starts = torch.zeros(1, 1024, dtype=torch.int32) if documents else None
            qkv, n_head, _ = inputs(random, 1, 1024, 2, head_size)
            y = fused.attention_qkvpacked(qkv, n_head, dropout_p=p, doc_start=starts)
            if backward:
                y.sum().backward()


def compiled_others() -> None:
    """Key lengths; grouped queries; no causal mask, also with an odd head size in fp16; TF32."""
    lengths = torch.zeros(1, dtype=torch.int32)
    for random, causal, p in ((BF16, True, 0.1), (FP32, False, 0.0), (FP32, True, 0.1)):
        q, k, v = (random.normal(1, 2, 1024, 64) for _ in range(3))
        y = fused.attention(q, k, v, causal=causal, dropout_p=p, key_lengths=lengths)
        y.sum().backward()
    for random, head_size in ((BF16, 128), (FP32, 64)):
        q, k, v = (random.normal(1, n_head, 1024, head_size) for n_head in (4, 1, 1))
        fused.attention(q, k, v).sum().backward()
    for random, length, head_size in ((FP16, 100, 25), (BF16, 1024, 128)):
        q, k, v = (random.normal(1, 2, length, head_size) for _ in range(3))
        fused.attention(q, k, v, causal=False).sum().backward()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        fused.attention_qkvpacked(FP32.normal(1, 1024, 3 * 2 * 64), 2).sum().backward()
    finally:
        torch.set_float32_matmul_precision(before)


COMPILED = {
    "attention-128": partial(
        compiled,
        *((BF16, 128, options) for options in (_PLAIN, _DROPOUT)),
        *((BF16, 80, options) for options in (_DOCUMENTS, _BOTH)),
        *((FP32, 128, _DROPOUT), (FP32, 80, _BOTH)),
        forward=((BF16, 80, _PLAIN), (FP32, 128, _PLAIN), (FP32, 80, _DOCUMENTS)),
    ),
    "attention-256": partial(
        compiled,
        *((BF16, 256, options) for options in (_DROPOUT, _DOCUMENTS, _BOTH)),
        (FP32, 256, _BOTH),
        forward=((BF16, 256, _PLAIN), (FP32, 256, _DOCUMENTS)),
    ),
    "attention-64": partial(
        compiled,
        *((BF16, 64, options) for options in (_PLAIN, _DROPOUT, _DOCUMENTS, _BOTH)),
        *((FP32, 64, options) for options in (_DOCUMENTS, _BOTH)),
    ),
    "attention-32": partial(
        compiled,
        *itertools.product((BF16,), (16, 32), (_DROPOUT, _DOCUMENTS, _BOTH)),
        *itertools.product((FP32,), (16, 32), (_DOCUMENTS, _BOTH)),
        forward=((BF16, 16, _PLAIN), (BF16, 32, _PLAIN)),
    ),
    "attention-others": compiled_others,
}
LEAST_CAPABILITY = dict.fromkeys(COMPILED, 80)  # sm_75 uses PyTorch's attention
