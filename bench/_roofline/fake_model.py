"""A model of fake tensors: every op can be counted, nothing is allocated, and no GPU is needed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses import FakeTensorMode

from fastgpt import GPT, GPTConfig
from fastgpt.kernels import _host, fused


@contextmanager
def fake_model(config: GPTConfig, dtype: torch.dtype, recompute: bool) -> Iterator[GPT]:
    """GPT on the fused ops. Within, tensors are fake, and the Triton ops take tensors of the CPU as
    they do under ``TRITON_INTERPRET=1``; on fake ones no kernel is launched, so none is interpreted
    either."""
    with FakeTensorMode(), _host.interpreted():
        with torch.device("meta"):
            gpt = GPT(config, ops=fused, recompute=recompute)
        weights = {
            name: torch.empty_like(w, device="cpu", dtype=dtype)
            for name, w in gpt.state_dict().items()
        }
        gpt.load_state_dict(weights, assign=True)
        yield gpt
