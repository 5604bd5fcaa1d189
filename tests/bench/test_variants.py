"""The variants that bench/run.py compares: what each computes and requires."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import run
from bench._step import baselines, variants
from fastgpt import devices
from fastgpt.kernels import configs
from tests.tools.small_models import small_model, tokens
from tests.tools.small_runs import data_set


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        *(("naive", True), ("naive", False), ("sdpa", True), ("sdpa", False)),
        *(("sdpa_chunked", True), ("sdpa_liger", True)),
    ],
)
def test_a_baseline_is_the_model(name: str, bias: bool, packages: list[str]) -> None:
    loss_of = variants.VARIANTS[name].loss
    if name == "sdpa_chunked" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("PyTorch 2.13 is the first with F.linear_cross_entropy")
    model, idx, targets = small_model(bias=bias), tokens(), tokens(seed=2)
    targets[0, :5] = -1
    expected = model(idx, targets)[1]
    expected.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, idx, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[parameter])
    n_norms = 2 * model.config.n_layer + 1
    liger = ["liger_layer_norm"] * n_norms + ["liger_fused_linear_cross_entropy"]
    assert packages == (liger if name == "sdpa_liger" else [])


def test_variants_are_what_their_names_say(
    monkeypatch: pytest.MonkeyPatch, packages: list[str]
) -> None:
    """Forward (nanoGPT's or ours), recomputation and AdamW of each variant, on equal weights."""
    calls: list[bool] = []
    forward = variants.GPT.forward

    def noted(self: Any, *args: Any) -> Any:
        calls.append(self.recompute)
        return forward(self, *args)

    monkeypatch.setattr(variants.GPT, "forward", noted)
    config = variants.GPTConfig(16, 32, 1, 2, 16)
    idx = torch.arange(16).view(1, 16)
    losses = {}
    for name, variant in variants.VARIANTS.items():
        if "F.linear" in str(variants.why_not(variant, torch.device("cpu"))):
            continue
        torch.manual_seed(0)
        gpt = variants.GPT(config, recompute=variant.recompute)
        model = baselines.huggingface_model(gpt) if variant.huggingface else gpt
        calls.clear()
        losses[name] = variant.loss(model, idx, idx).item()
        assert calls == ([] if variant.baseline else ["recompute" in name])
        optimizer = variants.optimizer_of(model, variant, 0.25)
        for group in optimizer.param_groups:
            assert (group["lr"], group["fused"]) == (0.25, None if variant.baseline else True)
        assert [len(group["params"]) for group in optimizer.param_groups] == [6, 10]
    assert [name for name in losses if variants.VARIANTS[name].baseline] == [
        name for name in losses if not name.startswith("fastgpt")
    ]
    assert list(losses.values()) == pytest.approx([losses["naive"]] * len(losses), abs=1e-5)


@pytest.mark.parametrize(
    ("memory", "batch_size"), [(15.6e9, 8), (25.4e9, 16), (42e9, 32), (85e9, 32), (1e9, 1)]
)
def test_defaults_are_those_of_the_gpu(
    memory: float, batch_size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    options = variants.default_options()
    assert options.batch_size == batch_size and options.n_layer == 12
    for has, dtype in ((False, torch.float16), (True, torch.bfloat16)):
        monkeypatch.setattr(devices, "has_bfloat16", lambda has=has: has)
        assert variants.Plan.of(options, tmp_path).dtype == dtype


def test_what_variants_need(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, compiled = torch.device("cpu"), variants.VARIANTS["sdpa_compile"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert variants.why_not(compiled, cpu) == "no C++ compiler (no-such-compiler)"
    assert variants.why_not(compiled, torch.device("cuda")) is None
    assert variants.why_not(variants.VARIANTS["fastgpt"], cpu) is None
    assert variants.why_not(variants.VARIANTS["sdpa_graphs"], cpu) == "CUDA graphs need a GPU"
    for name in ("sdpa_flash", "sdpa_cudnn"):
        assert variants.why_not(variants.VARIANTS[name], cpu) == "a choice of attention needs a GPU"
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    chunked = variants.why_not(variants.VARIANTS["sdpa_chunked"], torch.device("cuda"))
    assert chunked == "PyTorch 2.13 is the first with F.linear_cross_entropy"
    fp8 = variants.why_not(variants.VARIANTS["fastgpt_fp8_head"], cpu)
    assert fp8 == "fp8 needs a GPU of compute capability 8.9"
    unbiased = variants.why_not(variants.VARIANTS["huggingface"], cpu, bias=False)
    assert unbiased == "transformers' GPT-2 always has biases"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = variants.why_not(variants.VARIANTS["huggingface"], cpu)
    assert missing == "transformers is not installed"


def test_what_packages_need(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    liger = variants.VARIANTS["sdpa_liger"]
    assert variants.why_not(liger, cpu) == "Liger-Kernel needs a CUDA GPU"
    without = variants.why_not(liger, gpu, bias=False)
    assert without == "Liger-Kernel's LayerNorm always has a bias"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    old = variants.package_why_not("quack", gpu)
    assert old == "QuACK needs a GPU of compute capability 9.0"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = variants.why_not(liger, gpu)
    assert missing == "Liger-Kernel is not installed (pip install liger-kernel)"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "liger_kernel")
    assert variants.why_not(liger, gpu) is None


@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_cudnn"])
def test_a_choice_of_attention_is_the_only_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other SDPA backend is enabled while the loss is traced and computed."""
    enabled: list[bool] = []

    def noted(model: Any, x: Any, y: Any) -> Any:
        kernels = ("flash", "cudnn", "mem_efficient", "math")
        enabled.extend(getattr(torch.backends.cuda, f"{one}_sdp_enabled")() for one in kernels)
        return sum(p.sum() for p in model.parameters())  # no attention: a CPU has no such kernel

    variant = replace(variants.VARIANTS[name], loss=noted, compile_mode=None)
    options = replace(variants.CPU_OPTIONS, data_dir=data_set(tmp_path), block_size=8)
    plan = variants.Plan.of(options, data_set(tmp_path))
    variants.Training(variant, plan).step()
    assert enabled == [name == "sdpa_flash", name == "sdpa_cudnn", False, False]


@pytest.mark.parametrize("name", ["fastgpt", "fastgpt_train"])
def test_in_float16_the_loss_is_scaled_and_the_norm_is_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def noted(*args: Any) -> Any:
        norms.append((norm := clip(*args)).item())
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    plan = variants.Plan.of(variants.CPU_OPTIONS, data_set(tmp_path))
    for dtype in (torch.float32, torch.float16):
        training = variants.Training(variants.VARIANTS[name], plan, dtype)
        head: Any = training._model.lm_head
        head.weight.register_hook(lambda grad: norms.append(grad.norm().item()))
        assert training.step().isfinite()
    of_head, of_all, scaled_of_head, unscaled_of_all = norms
    assert scaled_of_head == pytest.approx(65536 * of_head, rel=0.01)
    assert unscaled_of_all == pytest.approx(of_all, rel=0.01)


def test_the_reference_is_for_few_sequences(tmp_path: Path) -> None:
    for batch_size, asked, has in ((4, None, True), (5, None, False), (5, True, True)):
        options = variants.Options(batch_size=batch_size, reference=asked)
        assert variants.Plan.of(options, tmp_path).has_reference is has


def test_a_table_of_tuned_launches_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda", 0)
    plan = replace(variants.Plan.of(variants.CPU_OPTIONS, tmp_path), device=gpu)
    monkeypatch.setattr(devices, "triton_refusal", lambda device: "")
    for lines, noted in (({}, False), ({configs.Key("gelu", "fwd"): None}, True)):
        monkeypatch.setitem(configs._TUNED, 0, lines)
        assert ("fastgpt takes 1 launches from a table" in " ".join(run._notes(plan))) == noted
