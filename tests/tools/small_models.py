"""Models and token ids small enough for interpreted kernels."""

import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig

V, BLOCK = 65, 16


def small_config(**changes) -> GPTConfig:
    sizes = dict(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=2, n_embd=32)
    return GPTConfig(**{**sizes, **changes})


def small_model(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(small_config(**changes))


def tokens(batch: int = 3, length: int = BLOCK, seed: int = 1) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))
