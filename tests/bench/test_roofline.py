"""bench/roofline.py: counts against hand counts and published ones, and the output."""

import functools
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bench import roofline
from bench._roofline import ceilings, counting, roofline_report
from fastgpt import GPTConfig
from fastgpt.kernels import fused
from tests.bench.test_bench import text_of

H200 = ceilings.DEVICES["h200"]
GPT2 = GPTConfig()


@functools.cache
def gpt2(variant: str, **options: Any) -> counting.Report:
    """GPT-2 124M at B=64, the size of the published figures."""
    return roofline.measure(variant, GPT2, 64, **options)


# -- by hand: a Linear followed by GELU

M, K, N = 48, 16, 32


def linear_gelu() -> counting.Report:
    x, weight, bias = torch.ones(M, K), torch.ones(N, K), torch.ones(N)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    return counting.count("", lambda: F.gelu(F.linear(x, weight, bias)).sum(), parameters, H200)


def test_counts_of_a_linear_and_a_gelu_by_hand() -> None:
    """float32, 4 bytes an element. Views do not appear."""
    report = linear_gelu()
    found = {name: (op.calls, op.bytes // 4, op.flops) for name, op in report.ops.items()}
    assert found == {
        "aten::addmm": (1, N + M * K + K * N + M * N, 2 * M * N * K),
        "aten::gelu": (1, 2 * M * N, 0),
        "aten::sum": (2, (M * N + 1) + (M * N + N), 0),  # the loss; the gradient of the bias
        "aten::ones_like": (1, 1 + 1, 0),
        "aten::gelu_backward": (1, 1 + M * N + M * N, 0),  # dout is one element, expanded
        "aten::mm": (1, M * N + M * K + N * K, 2 * M * N * K),  # dW; x needs no gradient
    }
    assert report.saved_bytes == 4 * (M * K + M * N)  # x and GELU's input


def test_predicted_time_is_the_longer_of_memory_and_products() -> None:
    slow_memory = ceilings.Ceilings("", tflops=1.0, tb_per_s=1e-6)
    slow_products = ceilings.Ceilings("", tflops=1e-6, tb_per_s=1.0)
    assert slow_memory.ms(flops=1000, nbytes=1000, half=True) == pytest.approx(1000 / 1e6 * 1e3)
    assert slow_products.ms(flops=1000, nbytes=1000, half=True) == pytest.approx(1000 / 1e6 * 1e3)
    assert slow_products.ms(flops=1000, nbytes=1000, half=False) == pytest.approx(2.0)  # TF32
    op = linear_gelu().ops["aten::gelu"]
    assert op.ms == pytest.approx(op.bytes / 4.3e12 * 1e3)


# -- by hand: a GPT of one block


def test_a_gpt_of_one_block_by_hand() -> None:
    """Every operator of nanoGPT's forward and backward in float32: calls, elements, FLOPs."""
    B, T, V, C, H = 3, 16, 40, 24, 2
    M = B * T
    MC, MV, VC, TC, CC, ids = M * C, M * V, V * C, T * C, C * C, 2 * M  # an id is two elements
    report = roofline.measure("sdpa", GPTConfig(T, V, 1, H, C), B, dtype="float32")
    found = {
        name.removeprefix("aten::"): (op.calls, op.bytes / 4, op.flops)
        for name, op in report.ops.items()
    }
    lse, stats = M * H, 2 * M
    pairs = T * T // 2
    forward = 2 * (3 * CC + CC + 4 * CC + 4 * CC) * M
    head = 2 * M * C * V
    assert found == {
        "arange": (1, 2 * T, 0),
        "embedding": (2, (VC + ids + MC) + (TC + 2 * T + TC), 0),
        # tokens + positions; two residuals, and their gradients; the two gradients of wte
        "add": (6, (2 * MC + TC) + 2 * 3 * MC + 2 * 3 * MC + 3 * VC, 0),
        "native_layer_norm": (3, 3 * (2 * MC + 2 * C + stats), 0),
        "addmm": (4, (4 + 2 + 5 + 5) * MC + 12 * CC + (3 + 1 + 4 + 1) * C, forward),
        "_scaled_dot_product_flash_attention": (1, 4 * MC + lse, 4 * B * H * pairs * (C // H)),
        "gelu": (1, 8 * MC, 0),
        "mm": (11, 2 * (16 * MC + 12 * CC) + 3 * (MC + VC + MV), 2 * forward + 3 * head),
        "_log_softmax": (1, 2 * MV, 0),
        "nll_loss_forward": (1, MV + ids + 2, 0),
        "ones_like": (1, 2, 0),
        "nll_loss_backward": (1, 1 + MV + ids + 1 + MV, 0),
        "_log_softmax_backward_data": (1, 3 * MV, 0),
        "native_layer_norm_backward": (3, 3 * (3 * MC + stats + 4 * C), 0),
        "gelu_backward": (1, 12 * MC, 0),
        # four biases; the positions, over the batch
        "sum": (5, (3 + 1 + 4 + 1) * (MC + C) + MC + TC, 0),
        "_scaled_dot_product_flash_attention_backward": (
            1,
            8 * MC + lse,
            10 * B * H * pairs * (C // H),
        ),
        "cat": (1, 6 * MC, 0),
        "embedding_dense_backward": (2, (MC + ids + VC) + (TC + 2 * T + TC), 0),
    }
    assert report.calls == 47
    # LayerNorms' inputs, outputs and statistics; qkv, attention; the MLP; log-probabilities
    saved = 3 * (2 * MC + stats) + (4 * MC + lse) + 8 * MC + (MV + 1) + 2 * ids + 2 * T
    assert report.saved_bytes == 4 * saved


def test_readme_shows_these_figures() -> None:
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    readme = "".join(page.read_text() for page in pages)
    rows = {
        "nanoGPT, eager with SDPA": gpt2("sdpa"),
        "fastgpt": gpt2("fastgpt"),
        "fastgpt, recompute": gpt2("fastgpt_recompute"),
    }
    for name, r in rows.items():
        gigabytes = f"{r.bytes / 1e9:.1f} | {r.saved_bytes / 1e9:.2f}"
        assert f"| {name} | {r.calls} | {gigabytes} | {r.ms:.1f} |" in readme
    floor = ceilings.floor(GPT2, 64, H200)
    moved, ms = sum(row.bytes for row in floor), sum(row.ms for row in floor)
    assert f"| each byte moved once | | {moved / 1e9:.1f} | | {ms:.1f} |" in readme


def test_published_floor() -> None:
    """Milliseconds at B=64, in execution order."""
    rows = ceilings.floor(GPT2, 64, H200)
    forward = [0.070, 3.53, 1.57, 1.18, 4.71, 4.71, 1.13, 6.43]
    backward = [12.85, 9.42, 9.42, 2.35, 4.50, 7.06, 2.34]
    for row, ms in zip(rows, forward + backward, strict=False):
        assert row.ms == pytest.approx(ms, abs=0.016), row
    assert sum(row.flops for row in rows) / 1e12 == pytest.approx(53, abs=0.5)
    # The published 72.2 ms include 0.81 for AdamW and 0.06 for the gradient norm.
    assert sum(row.ms for row in rows) == pytest.approx(72.2 - 0.81 - 0.06, abs=0.1)


@pytest.mark.parametrize("size", [{"bias": False}, {"vocab_size": 50257, "n_head": 8}], ids=str)
def test_eager_products_are_those_of_the_floor(size: dict[str, Any]) -> None:
    """FLOPs by PyTorch's formulas equal those by the floor's own."""
    sizes = dict(block_size=256, vocab_size=320, n_layer=3, n_head=4, n_embd=128) | size
    config = GPTConfig(**sizes)
    rows = ceilings.floor(config, 5, H200)
    assert roofline.measure("sdpa", config, 5).flops == sum(row.flops for row in rows)


def test_nothing_is_allocated_whatever_the_size() -> None:
    """The scores alone would take terabytes."""
    config = GPTConfig(block_size=8192, n_layer=4, n_head=25, n_embd=1600)
    report = roofline.measure("naive", config, 256)
    scores = 256 * 25 * 8192 * 8192
    assert report.saved_bytes > 4 * 4 * scores


# -- dtypes and sizes


def test_autocast_casts_by_hand() -> None:
    """One block, in elements: each weight once a step, not once a use."""
    B, T, V, C = 2, 32, 48, 16
    M = B * T
    report = roofline.measure("sdpa", GPTConfig(T, V, 1, 1, C), B)
    matrices, biases = 12 * C * C + V * C, (3 + 1 + 4 + 1) * C
    normed = 3 * M * C  # what LayerNorm hands to qkv, FC and the head
    joined = 2 * M * C  # the gradient of what a projection adds to the float32 stream
    # A cast in forward and the reverse one of its gradient; `joined` is cast in backward only,
    # since the addition takes both dtypes.
    casts = 2 * (matrices + biases + normed + M * V) + joined
    assert report.ops["aten::_to_copy"].calls == 2 * (5 + 4 + 3 + 1) + 2
    assert report.ops["aten::_to_copy"].bytes == (4 + 2) * casts
    half = roofline.measure("sdpa", GPTConfig(T, V, 1, 1, C), B, params="bfloat16")
    assert "aten::_to_copy" not in half.ops and half.flops == report.flops


# -- cost formulas


@pytest.mark.parametrize("causal", [True, False])
def test_attention_formulas_reach_pytorchs_flop_counter(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    B, H, T, D = 2, 3, 64, 16
    product = 2 * B * H * T * T * D // (2 if causal else 1)

    def packed(qkv: Tensor) -> Tensor:
        return fused.attention_qkvpacked(qkv, H, causal=causal)

    def separate(q: Tensor) -> Tensor:
        return fused.attention(q, q, q, causal=causal)

    for op, shape in ((packed, (B, T, 3 * H * D)), (separate, (B, H, T, D))):
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            y = op(torch.empty(shape, requires_grad=True))
            assert counter.get_total_flops() == 2 * product
            y.sum().backward()
            # both backward kernels compute the scores and the probabilities' gradient
            assert counter.get_total_flops() == (2 + 7) * product


def test_attention_is_charged_for_each_kernel() -> None:
    B, H, T, D = 2, 3, 64, 16
    with FakeTensorMode():
        qkv = torch.empty(B, T, 3 * H * D, requires_grad=True)
        report = counting.count("", lambda: fused.attention_qkvpacked(qkv, H).sum(), [qkv], H200)
    x, delta = 4 * B * T * H * D, 4 * B * T * H
    lse = 2 * delta  # in float32
    assert report.ops["fastgpt::attention_qkvpacked"].bytes == 4 * x + lse
    # dq: q, k, v, out, dout, lse → delta, dq; dk and dv: q, k, v, dout, lse, delta → dk, dv
    backward = report.ops["fastgpt::attention_qkvpacked_bwd"]
    assert backward.bytes == 2 * (6 * x + lse + delta)
    assert backward.calls == 1


def test_operators_in_place_and_views() -> None:
    x = torch.ones(10, 10)
    data = torch.ones(10, 10)

    def forward() -> Tensor:
        y = x * 1.0  # 100 in, 100 out
        y.view(-1, 5).t()
        y.add_(data)  # 200 in, 100 out
        y.zero_()  # 100 out
        y.copy_(data)  # 100 in, 100 out
        return (y * x).sum()  # 200 in, 100 out; 100 in, 1 out

    report = counting.count("", forward, [x.requires_grad_()], H200)
    elements = {name: op.bytes // 4 for name, op in report.ops.items() if name != "aten::mul"}
    assert elements["aten::add_"] == 300
    assert elements["aten::zero_"] == 100
    assert elements["aten::copy_"] == 200
    assert not elements.keys() & {"aten::t", "aten::view", "aten::detach"}


# -- the command line

SMALL = ["--batch_size=2", "--block_size=32", "--vocab_size=64"]


def test_a_run_writes_its_record_and_its_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--variant", "sdpa", "fastgpt", "--tflops=100", f"--out={tmp_path}"]
    assert roofline.main([*SMALL, *given]) == 0
    run = json.loads((tmp_path / "roofline.json").read_text())
    assert list(run["variants"]) == ["sdpa", "fastgpt"]
    used = ceilings.Ceilings("given ceilings", 100.0, H200.tb_per_s)
    expected = roofline.measure("sdpa", GPTConfig(32, 64), 2, ceilings=used)
    assert run["variants"]["sdpa"] == json.loads(json.dumps(asdict(expected)))
    assert run["ceilings"] == asdict(used)
    shown = capsys.readouterr().out
    for table_line in text_of(roofline_report.table(run)).splitlines():
        assert table_line.rstrip() in shown
    chart = (tmp_path / "roofline.png").read_bytes()
    assert chart.startswith(b"\x89PNG\r\n\x1a\n")
    assert roofline.main([*SMALL, "--variant=sdpa", f"--out={tmp_path}"]) == 2
    assert str(tmp_path / "roofline.json") in capsys.readouterr().err
    assert (tmp_path / "roofline.png").read_bytes() == chart

    kinds = roofline_report.by_kind(run)
    for name, variant in run["variants"].items():
        assert sum(kinds[name].values()) == pytest.approx(variant["ms"])
        for key in ("calls", "bytes", "flops", "ms"):
            assert variant[key] == pytest.approx(sum(op[key] for op in variant["ops"].values()))
    assert sum(kinds["floor"].values()) == pytest.approx(run["floor"]["ms"])


def test_the_table_fits_80_columns_at_full_size() -> None:
    run = roofline.record(roofline.Options(variant=("naive", "fastgpt_recompute")))
    shown = text_of(roofline_report.table(run))
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    assert re.search(r"fastgpt_recompute +154 +167.1\d .* 12.49", shown)


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="dropout must be 0"):
        roofline.measure("sdpa", GPTConfig(64, dropout=0.1), 1)
