"""The command line, ``GPT.generate`` and nanoGPT's training loop on the pretended device, with
filled kernels. Started by ``test_on_pretended_device.py``."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt import GPT, ops
from fastgpt import __main__ as cli
from fastgpt.generation import Generator, Sampling
from fastgpt.sampler import round_matrices
from tests.tools.small_models import small_model, tokens
from tests.tools.small_runs import arguments, data_set, small_keys

HALF = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_train_and_sample(
    tmp_path: Path,
    dtype: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == "auto":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    data_set(tmp_path)
    small = dict(n_layer=1, n_head=1, max_iters=5, eval_interval=5, eval_iters=1)
    keys = small_keys(tmp_path, **small, device="auto", dtype=dtype)
    assert cli.main(["train", "--preset=gpt2", *arguments(keys)]) == 0
    out = capsys.readouterr().out
    named = "bfloat16" if dtype == "auto" else dtype
    assert f"parameters on cuda, {named}" in out
    unknown = "no mfu: the peak of pretended device is not known"
    assert ", mfu " in out if dtype == "auto" else unknown in out

    common = ["sample", f"--out_dir={tmp_path / 'out'}", "--max_new_tokens=20", "--device=cuda"]
    options = ["--num_samples=3", "--json", "--top_k=5", "--repetition_penalty=1.2"]
    options.append("--batch_size=1" if dtype == "auto" else "--batch_size=2")
    assert cli.main([*common, *options, "--start=12 t"]) == 0  # beyond the window of 16 tokens
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [20] * 3
    assert cli.main([*common, "--num_samples=1", f"--dtype={dtype}"]) == 0


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "pretended device, compute capability 9.0" in out and "on the Triton kernels" in out
    assert "DIFFERS FROM the reference ops" in out  # kernels are filled


# ---------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("dtype", HALF)
def test_generate_with_a_captured_step(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator's second batch reuses the graph captured for the first."""
    model = small_model(n_layer=1).cuda().eval()
    round_matrices(model, getattr(torch, dtype))
    prompts = [tokens(1, 3)[0].cuda(), tokens(1, 9)[0].cuda()]
    sampling = Sampling(temperature=1.0, top_k=50, repetition_penalty=1.2)

    def drawn() -> list[list[int]]:
        torch.manual_seed(3)
        generator = Generator(model, sampling)
        with torch.autocast("cuda", getattr(torch, dtype), enabled=dtype != "float32"):
            return [t.tolist() for _ in range(2) for t in generator(prompts, 12)]

    captured = drawn()
    monkeypatch.setattr("fastgpt.generation.Graphed", lambda step, device: step)
    assert drawn() == captured


def test_generate_past_the_window() -> None:
    model = small_model(n_layer=1).cuda().eval()
    idx = tokens(2, 10).cuda()
    out = model.generate(idx, 10, temperature=0.8, top_k=5)
    assert out.shape == (2, 20) and torch.equal(out[:, :10], idx)
    assert all(0 <= token < model.config.vocab_size for token in out.flatten().tolist())


# ------------------------------------------------------------------------------ nanoGPT's loop


def test_a_compiled_model_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it is the first to query the GPU's support; the optimizer queries in eager mode."""
    monkeypatch.setattr(ops, "_known", {})
    model = small_model(n_layer=1).cuda()
    idx = tokens(2, 8).cuda()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(idx, idx)[1].backward()
        ops.gelu(torch.ones(3, device="cuda"))
        compiled(idx, idx)[1].backward()


@pytest.mark.parametrize("dtype", HALF)
def test_nanogpts_loop(dtype: str) -> None:
    """Pinned batches copied ahead, autocast, GradScaler, clipping, AdamW."""
    torch.manual_seed(0)
    data = torch.randint(64, (200,))
    model = GPT(small_model(n_layer=1, vocab_size=64, bias=False).config).cuda()
    context = torch.amp.autocast("cuda", getattr(torch, dtype))
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cuda")

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(data) - 16, (2,)).tolist()
        x = torch.stack([data[i : i + 16] for i in starts]).pin_memory()
        y = torch.stack([data[i + 1 : i + 17] for i in starts]).pin_memory()
        return x.to("cuda", non_blocking=True), y.to("cuda", non_blocking=True)

    x, y = batch()
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        for _ in range(2):
            with context:
                _, loss = model(x, y)
            x, y = batch()
            scaler.scale(loss / 2).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        assert loss.isfinite().item()
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.isfinite().all() and not torch.equal(old, new)
    assert model.estimate_mfu(4, 0.5) > 0
