"""Runs of ``fastgpt train`` on the pretended device with filled kernels are equal bit for bit with
and without CUDA graphs and stops. Started by ``test_on_pretended_device.py``."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.data.prepare import prepare
from fastgpt.data.sources import TextSource, source_of
from fastgpt.kernels import chunked_loss
from fastgpt.tokenizer.training import train_tokenizer
from fastgpt.training import log
from fastgpt.training.distributed import World
from fastgpt.training.step import Step
from fastgpt.training.trainer import Trainer
from tests.tools.small_runs import assert_same, data_set, interrupted, state_of, trained

# 16 different characters, a vocabulary size that fp8 products support.
TEXT = "".join(f"{n} * {n + 1} + 0 = {n * (n + 1)};\n" for n in range(200))
SMALL = dict(
    n_layer=1,
    n_head=1,
    batch_size=2,
    gradient_accumulation_steps=2,
    max_iters=7,
    eval_interval=4,
    eval_iters=1,
    log_interval=2,
    keep_last=10,
    device="cuda",
)

OPTIONS: dict[str, dict[str, Any]] = {
    "dropout": {},
    "plain": dict(dropout=0.0, bias=True, grad_clip=0.0, gradient_accumulation_steps=1),
    "recompute": dict(recompute=True),
    "documents": dict(document_mask=True),
    "fp8_head": dict(fp8="head"),
}


def documents(root: Path) -> None:
    """Write a data set of several texts to ``root/small``."""
    (root / "texts").mkdir(parents=True)
    for number, line in enumerate(TEXT.splitlines()):
        (root / "texts" / f"{number:03d}.txt").write_text(line)
    tokenizer = train_tokenizer(TextSource(TEXT), "bpe", 260, root / "bpe")
    prepare(source_of(root / "texts"), tokenizer, root / "small", val_share=0.2)


def run(root: Path, **changes: Any) -> dict[str, Any]:
    """Train; return all results of the run except its speed."""
    if not changes.get("document_mask"):
        data_set(root, TEXT)
    elif not (root / "small").exists():
        pytest.importorskip("tokenizers")
        documents(root)
    trainer = trained(root, **{**SMALL, **changes})
    assert math.isfinite(trainer.val_loss)
    state = state_of(root)
    state["config"] = None
    rows = log.read(root / "out" / log.LOG)
    kept = ("iter", "loss", "train/loss", "val/loss", "lr")
    return {**state, "log": [{key: row.get(key) for key in kept} for row in rows]}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(dtype, OPTIONS[name], id=f"{dtype}-{name}")
        for dtype in ("float32", "bfloat16")
        for name in OPTIONS
        if dtype == "bfloat16" or name in ("dropout", "plain")
    ],
)
def test_a_graph_changes_nothing(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    graphed = run(tmp_path / "graph", dtype=dtype, **options)
    plain = run(tmp_path / "plain", dtype=dtype, cuda_graph=False, **options)
    assert_same(graphed, plain)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float16(tmp_path: Path, options: dict[str, Any]) -> None:
    assert run(tmp_path, dtype="float16", **options)["fastgpt"]["scaler"]["scale"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_stop_is_seamless(tmp_path: Path, dtype: str) -> None:
    """One graph is captured before the stop and another one after it."""
    whole = run(tmp_path / "whole", dtype=dtype, max_iters=12)
    with interrupted(Trainer, 5), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", dtype=dtype, max_iters=12)
    resumed = run(tmp_path / "stopped", dtype=dtype, max_iters=12, init_from="resume")
    assert_same(resumed, whole)


def test_bigram(tmp_path: Path) -> None:
    run(tmp_path, model="bigram")


def test_a_loss_in_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS accumulates the second chunk's gradient into the first's."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", {"cuda": 20 * 16 * 2, "other": 20 * 16 * 2})
    assert chunked_loss.chunk_rows(16, torch.bfloat16, torch.device("cuda")) < 32
    graphed = run(tmp_path / "graph", dtype="bfloat16")
    assert_same(graphed, run(tmp_path / "plain", dtype="bfloat16", cuda_graph=False))


def test_where_a_graph_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2).cuda()
    options: dict[str, Any] = dict(device=torch.device("cuda"), cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph must be False with a gradient scaler"):
        scaler = torch.amp.GradScaler("cuda")
        Step(model, torch.optim.AdamW(model.parameters()), scaler=scaler, **options)
    with pytest.raises(ValueError, match="cuda_graph must be False in 2 processes"):
        Step(model, torch.optim.AdamW(model.parameters()), world=World(size=2), **options)
