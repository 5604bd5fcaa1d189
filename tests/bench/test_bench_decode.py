"""bench/bench_decode.py: a complete run at a tiny size, and its byte counts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_decode

TINY = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--vocab_size=128",
    "--block_size=64",
    "--new_tokens=40",
    "--prompt=3",
    "--batch_size=2",
    "--device=cpu",
    "--threads=1",
]


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "decode.json"
    assert bench_decode.main([*TINY, f"--out={path}"]) == 0
    assert "fastgpt over nanoGPT's method: " in " ".join(capsys.readouterr().out.split())
    record = json.loads(path.read_text())
    assert record["options"]["new_tokens"] == 40 and record["dtype"] == "float32"
    for name, rate in record["tokens_per_s"].items():
        assert rate == pytest.approx(2 * 40 / record["seconds"][name])
    rates = list(record["tokens_per_s"].values())
    assert record["speedup"] == pytest.approx(rates[1] / rates[0])
    assert bench_decode.main([*TINY, f"--out={path}"]) == 2
    assert "must not exist yet" in capsys.readouterr().err


def test_bytes_of_a_token() -> None:
    options = bench_decode.Options(n_layer=2, n_head=2, n_embd=32, batch_size=3, new_tokens=8)
    config = bench_decode.GPTConfig(64, 128, 2, 2, 32, bias=False)
    model = bench_decode.GPT(config)
    weights = 128 * 32 + 2 * 12 * 32 * 32 + 5 * 32
    cached = 3 * 2 * 2 * 32 * 5  # 1 + 8 / 2 cached tokens on average
    assert bench_decode.bytes_per_token(model, options) == 4 * (weights + cached)


def test_other_tokens_are_refused(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def others(self: Any, prompts: Any, new_tokens: int) -> Any:
        return (torch.full((2,), 127 - step) for step in range(new_tokens))

    monkeypatch.setattr(bench_decode.Generator, "__call__", others)
    assert bench_decode.main(TINY) == 2
    assert "greedy tokens with and without a cache differ" in " ".join(
        capsys.readouterr().err.split()
    )
