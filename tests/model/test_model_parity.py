"""The whole model on each set of ops against the one on ``reference``: logits, loss, all gradients,
a training run; causality; autocast and torch.compile.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import fastgpt.ops
from fastgpt import GPT
from fastgpt.kernels import reference, torch_ops
from tests.tools.small_models import BLOCK, V, model_with, small_config, tokens

CONFIGS = {
    "even": (small_config(bias=False), BLOCK),
    "odd": (small_config(n_head=3, n_embd=75, bias=True), 7),
    "one-token": (small_config(n_layer=1, n_head=1), 1),
}


def batch(length: int, device: str) -> tuple[Tensor, Tensor]:
    x, y = tokens(3, length).to(device), tokens(3, length, seed=2).to(device)
    y[0, 0] = -1
    return x, y


def outcome(model: torch.nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Logits from evaluation, then training loss and its gradients, by name."""
    with torch.no_grad():
        logits = model(x, y)[0]
    nothing, loss = model(x, y)
    assert nothing is None
    loss.backward()
    grads = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}
    return {"logits": logits, "loss": loss.detach(), **grads}


def largest_differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    assert a.keys() == b.keys()
    return {name: (a[name].float() - b[name].float()).abs().max().item() for name in a}


@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize("case", CONFIGS)
def test_logits_loss_and_gradients(ops, device, case, gelu):
    config, length = CONFIGS[case]
    x, y = batch(length, device)
    ours = outcome(model_with(ops, config, device, gelu=gelu), x, y)
    plain = outcome(model_with(reference, config, device, gelu=gelu), x, y)
    too_far = {k: d for k, d in largest_differences(ours, plain).items() if not d <= 1e-5}
    assert not too_far


def test_logits_on_request_change_nothing_else(ops, device):
    x, y = batch(BLOCK, device)
    model = model_with(ops, small_config(), device)
    fused_loss = outcome(model, x, y)
    model.zero_grad()
    logits, loss = model(x, y, return_logits=True)
    loss.backward()
    assert torch.equal(logits, fused_loss["logits"])
    got = {"logits": logits, "loss": loss, **{k: p.grad for k, p in model.named_parameters()}}
    assert max(largest_differences(got, fused_loss).values()) <= 1e-5


def following(x: Tensor) -> Tensor:
    """The next token of a toy language: one of two with equal probability, entropy ln 2."""
    return (3 * x + torch.randint(1, 3, x.shape)) % V


def training_losses(ops: ModuleType, device: str, gelu: str = "none") -> Tensor:
    config = small_config(n_layer=1, block_size=8, bias=False)
    model = model_with(ops, config, device, gelu=gelu)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")  # the same AdamW for both
    torch.manual_seed(1)
    losses = []
    for _ in range(25):
        sequence = [torch.randint(V, (2,))]
        for _ in range(8):
            sequence.append(following(sequence[-1]))
        text = torch.stack(sequence, dim=1).to(device)
        loss = model(text[:, :-1], text[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def test_training_does_not_drift(ops, device):
    """25 updates at a high learning rate; the tanh GELU drifts past the bound."""
    ours, plain = (training_losses(o, device) for o in (ops, reference))
    assert plain[-5:].mean() < plain[:5].mean() - 0.3  # it learns
    assert (ours - plain).abs().max() <= 1e-5
    assert (training_losses(reference, device, gelu="tanh") - plain).abs().max() > 1e-4


@pytest.mark.parametrize("position", [5, BLOCK - 1])
def test_causality(ops, device, position):
    model = model_with(ops, small_config(), device).eval()
    x = tokens(2, BLOCK).to(device)
    changed = x.clone()
    changed[:, position] = (x[:, position] + 1) % V
    with torch.no_grad():
        before, after = model(x, x)[0], model(changed, x)[0]
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).flatten(2).any(2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "parameters"])
def test_half_precision(ops, device, dtype, autocast):
    """Errors against float32 are at most twice the plain model's in the same precision."""
    if ops is torch_ops and not autocast:
        pytest.skip("PyTorch's LayerNorm on the CPU sums a bf16 bias gradient in bf16")
    x, y = batch(BLOCK, device)
    truth = outcome(model_with(reference, small_config(), device), x, y)
    del truth["loss"]  # a scalar may be right by luck; it is checked against the logits below

    def errors(which: ModuleType) -> dict[str, float]:
        model = model_with(which, small_config(), device)
        if not autocast:
            model.to(dtype)
        with torch.autocast(device, dtype, enabled=autocast):
            result = outcome(model, x, y)
        logits = result["logits"]
        assert logits.dtype == dtype and result["loss"].dtype == torch.float32
        expected = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1)
        torch.testing.assert_close(result["loss"], expected)
        return {k: (result[k].float() - truth[k]).square().mean().sqrt().item() for k in truth}

    ours, plain = errors(ops), errors(reference)
    too_far = {k: (ours[k], plain[k]) for k in ours if not ours[k] <= 2 * plain[k] + 1e-5}
    assert not too_far


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_compiled_whole(ops, device, recompute):
    x, y = batch(BLOCK, device)
    eager = outcome(model_with(ops, small_config(n_layer=1), device), x, y)
    model = model_with(ops, small_config(n_layer=1), device, recompute=recompute)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert max(largest_differences(outcome(compiled, x, y), eager).values()) <= 1e-6


def test_few_recompilations_for_many_lengths(ops, device):
    """One graph for the first length, one for all others; length 1 may have its own."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = model_with(ops, small_config(n_layer=1, block_size=12), device)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (12, 7, 1, 8, 2, 11):
        x, y = batch(length, device)
        expected = model(x, y)[1]
        torch.testing.assert_close(compiled(x, y)[1], expected, atol=1e-6, rtol=0)
    assert counter.frame_count <= 3


def _has_cpp_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++"))


def test_inductor(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch included: on a GPU the graph contains the Triton kernels. The cache starts empty,
    because Inductor's key ignores ATEN_CPU_CAPABILITY; vector instructions are off, because they
    double the C++ compile time."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", False)
    if device == "cpu" and not _has_cpp_compiler():
        pytest.skip("Inductor needs a C++ compiler on the CPU")
    x, y = batch(BLOCK, device)
    config = small_config(n_layer=1)
    eager, model = model_with(reference, config, device), model_with(fastgpt.ops, config, device)
    compiled: Any = torch.compile(model, fullgraph=True)
    losses = eager(x, y)[1], compiled(x, y)[1]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    for p, q in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=0)


def test_dispatch_compiles_for_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors: one graph, with the Triton operators in it."""
    monkeypatch.setattr("fastgpt.devices.triton_refusal", lambda device: "")
    monkeypatch.setattr("fastgpt.devices.triton_multiplies", lambda device: True)
    found: set[str] = set()

    def record(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.device("meta"):
        model = GPT(small_config(dropout=0.1))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cuda")
        x = torch.zeros(4, BLOCK, dtype=torch.int64, device="cuda")
        logits, loss = torch.compile(model, fullgraph=True, backend=record)(x, x)
    assert logits.shape == (4, BLOCK, V) and loss.device.type == "cuda"
    ours = {name for name in found if name.startswith("fastgpt")}
    assert ours == {
        f"fastgpt.{op}.default"
        for op in ("attention_qkvpacked", "embedding", "layer_norm", "linear", "mlp")
    }
