"""A model with a separator: packed documents give the same results as each document alone."""

import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import GPT
from fastgpt.kernels import fused, reference, torch_ops
from tests.tools.small_models import BLOCK, V, model_with, small_config, small_model, tokens

EOT_TOKEN = 7
# (sequence, begin, end) of every document of ``batch``
DOCUMENTS = [(0, 0, 5), (0, 5, 6), (0, 6, 16), (1, 0, 16), (2, 0, 15), (2, 15, 16), (3, 0, 16)]


@pytest.fixture(params=[reference, torch_ops, fused], ids=["reference", "torch_ops", "fused"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def batch(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Tokens and targets: a separator opens each document, except those that open sequences 0-2."""
    x = tokens(4, BLOCK)
    x[x == EOT_TOKEN] = EOT_TOKEN + 1
    for sequence, begin, _ in DOCUMENTS:
        if begin or sequence == 3:
            x[sequence, begin] = EOT_TOKEN
    targets = tokens(4, BLOCK, seed=2)
    targets[:, ::3] = -1
    return x.to(device), targets.to(device)


def pieces(*tensors: Tensor) -> Iterator[list[Tensor]]:
    for sequence, begin, end in DOCUMENTS:
        yield [t[sequence : sequence + 1, begin:end] for t in tensors]


@pytest.mark.parametrize("recompute", [False, True])
def test_logits_loss_and_gradients_are_those_of_the_documents(
    ops: ModuleType, recompute: bool, device: str
) -> None:
    if device == "cuda" and ops is torch_ops:
        pytest.skip("torch_ops serve machines without CUDA")
    x, y = batch(device)
    config = small_config(n_layer=1)
    model = model_with(ops, config, device, recompute=recompute, eot_token=EOT_TOKEN)
    logits, loss = model(x, y, return_logits=True)
    fused_loss = model(x, y)[1]
    fused_loss.backward()
    alone = model_with(ops, config, device)
    total = torch.zeros((), device=device)
    for part_x, part_y, part_logits in pieces(x, y, logits):
        expected, part_loss = alone(part_x, part_y, return_logits=True)
        assert (part_logits - expected).abs().max() <= 1e-5
        n_targets = (part_y != -1).sum()
        if n_targets:
            total = total + part_loss * n_targets
    total = total / (y != -1).sum()
    total.backward()
    for found in (loss, fused_loss):
        assert abs(found - total) <= 1e-5
    for (name, ours), plain in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert ours.grad is not None and plain.grad is not None
        assert (ours.grad - plain.grad).abs().max() <= 1e-5, name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_without_a_separator_in_the_tokens_nothing_changes(dtype: torch.dtype) -> None:
    model = model_with(fused, small_config())
    x, y = (t[1:2].to(dtype) for t in batch())
    expected = model(x, y)[1]
    model.eot_token = EOT_TOKEN
    assert torch.equal(model(x, y)[1], expected)
    model.eot_token = int(x[0, 4])
    assert not torch.equal(model(x, y)[1], expected)
    model.eot_token = None
    assert torch.equal(model(x, y)[1], expected)


def test_dropout_draws_what_it_draws_without(ops: ModuleType) -> None:
    """For a single document all dropout masks are the same as without a separator."""
    losses = []
    x, y = (t[3:4] for t in batch())  # begins with the separator
    for eot_token in (None, EOT_TOKEN):
        torch.manual_seed(0)
        model = GPT(small_config(dropout=0.3), ops=ops, eot_token=eot_token)
        losses.append(model(x, y)[1])
    torch.testing.assert_close(*losses)


def test_generate_continues_the_last_document() -> None:
    """Greedy, past the window; tokens before the separator have no influence."""
    model = model_with(torch_ops, small_config()).eval()
    with torch.no_grad():  # else it only repeats the last token
        model.transformer.wpe.weight.mul_(10)
        model.transformer.wte.weight.mul_(0.2)
    prompt = torch.tensor([[3, 1, EOT_TOKEN, 2, 5]])
    alone = model.generate(prompt[:, 2:], BLOCK - 5, temperature=0.0)
    without = model.generate(prompt, BLOCK - 5, temperature=0.0)
    model.eot_token = EOT_TOKEN
    idx = prompt
    for _ in range(2 * BLOCK):
        last = model(idx[:, -BLOCK:])[0][:, -1]
        idx = torch.cat((idx, last.argmax(-1, keepdim=True)), dim=1)
    found = model.generate(prompt, 2 * BLOCK, temperature=0.0)
    assert torch.equal(found, idx)
    assert torch.equal(found[:, 2:BLOCK], alone)
    assert not torch.equal(found[:, :BLOCK], without) and len(found.unique()) > 5


@pytest.mark.parametrize("ops", [torch_ops, fused], ids=["torch_ops", "fused"])
def test_compiles_without_a_graph_break(ops: ModuleType) -> None:
    """With the same loss and gradients as eager mode, under autocast."""
    x, y = batch()
    results = []
    for compiled in (False, True):
        model: Any = model_with(ops, small_config(n_layer=1), eot_token=EOT_TOKEN)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(x, y)[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_host_never_waits() -> None:
    """Run forward and backward with every host-device synchronisation an error."""
    x, y = batch("cuda")
    model = model_with(fused, small_config(), "cuda", eot_token=EOT_TOKEN)
    model(x, y)[1].backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, y)[1].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("token", "error"),
    [(-1, ValueError), (V, ValueError), (1.0, TypeError), ("\n", TypeError), (True, TypeError)],
)
def test_separators_that_are_refused(token: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="eot_token must .*got " + re.escape(repr(token))):
        GPT(small_config(), eot_token=token)
    model = small_model()
    with pytest.raises(error, match="eot_token must "):
        model.eot_token = token
    assert model.eot_token is None
