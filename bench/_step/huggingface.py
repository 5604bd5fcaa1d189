"""Hugging Face's GPT-2 with a fastgpt model's weights, as one of the baselines of ``run.py``."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import GPT

# Hugging Face stores these as (in, out), nn.Linear as (out, in).
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def model_of(gpt: GPT) -> nn.Module:
    """The same model, exact GELU included, on the same device. It takes SDPA for its attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = gpt.config
    if not c.bias:
        raise ValueError("bias must be True for Hugging Face's GPT-2, got False")
    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        activation_function="gelu",
        resid_pdrop=c.dropout,
        embd_pdrop=c.dropout,
        attn_pdrop=c.dropout,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    model: Any = GPT2LMHeadModel(config)
    model.load_state_dict(
        {
            name: weight.t() if name.endswith(_TRANSPOSED) else weight
            for name, weight in gpt.state_dict().items()
        }
    )
    return model.to(gpt.lm_head.weight.device)


def loss(model: Any, idx: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of ``targets`` (B, T) after ``idx`` (B, T)."""
    logits = model(idx).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
