"""``torch.func`` on a whole model: functional calls, per-sequence gradients, ensembles."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from fastgpt import GPT, GPTConfig

CONFIG = GPTConfig(block_size=16, vocab_size=48, n_layer=1, n_head=2, n_embd=32, bias=True)
Weights = dict[str, Tensor]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own operators
def test_gradients_of_single_sequences(ops, device: str) -> None:
    model = GPT(CONFIG, ops=ops).to(device)
    idx = torch.randint(48, (3, 8), device=device)
    targets = idx.roll(-1, 1)

    def loss(weights: Weights, idx: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = functional_call(model, weights, (idx[None], targets[None]))[1]
        return found

    weights = {name: p.detach() for name, p in model.named_parameters()}
    got = vmap(grad(loss), in_dims=(None, 0, 0))(weights, idx, targets)
    for i in range(3):
        model.zero_grad()
        model(idx[i : i + 1], targets[i : i + 1])[1].backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(got[name][i], p.grad, rtol=1e-4, atol=1e-6, msg=name)

    models = [model, GPT(CONFIG, ops=ops).to(device)]
    stacked, _ = stack_module_state(models)  # type: ignore[arg-type]
    losses = vmap(loss, in_dims=(0, None, None))(stacked, idx[0], targets[0])
    expected = [m(idx[:1], targets[:1])[1] for m in models]
    torch.testing.assert_close(losses, torch.stack(expected))
