"""Models and token ids small enough for interpreted kernels."""

from typing import Any

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


def model_with(ops: Any, config: GPTConfig, device: str = "cpu", **options: Any) -> GPT:
    """A model with the same weights for any ops; gains and biases are not at initial values."""
    torch.manual_seed(0)
    model = GPT(config, ops=ops, **options)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    return model.to(device)


def tokens(batch: int = 3, length: int = BLOCK, seed: int = 1) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))
