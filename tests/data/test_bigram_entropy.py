"""The bigram statistics of a data set against their definitions."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt import _progress
from fastgpt.data.builtin_texts import bigram_counts, bigram_entropy
from tests.tools.small_runs import data_set


def write_val(folder: Path, ids: list[int]) -> Path:
    np.array(ids, dtype=np.uint16).tofile(folder / "val.bin")
    return folder


@pytest.mark.parametrize("span", [1 << 22, 7])
def test_bigram_entropy_is_the_definition(
    span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "SPAN", span)
    text = "She sells sea shells on the sea shore; the shells she sells are sea shells.\n" * 7
    folder, cut = data_set(tmp_path, text), len(text) * 9 // 10
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        pairs = Counter(zip(part, part[1:], strict=False))
        firsts = Counter(part[:-1])
        entropy = -sum(n / (len(part) - 1) * math.log(n / firsts[a]) for (a, _), n in pairs.items())
        assert bigram_entropy(folder, split) == pytest.approx(entropy, abs=1e-12)
    assert bigram_entropy(folder) == bigram_entropy(folder, "val")


def test_bigram_entropy_is_the_least_loss_of_a_table(tmp_path: Path) -> None:
    ids = torch.randint(5, (2000,)) ** 2 % 11
    write_val(tmp_path, ids.tolist())
    counts = torch.zeros(17, 17, dtype=torch.float64)
    counts.index_put_((ids[:-1], ids[1:]), torch.ones(1999, dtype=torch.float64), accumulate=True)
    entropy = bigram_entropy(tmp_path)
    best = torch.nn.functional.cross_entropy(counts.log()[ids[:-1]], ids[1:])
    assert float(best) == pytest.approx(entropy, abs=1e-12)
    worse = torch.nn.functional.cross_entropy((counts + 0.01).log()[ids[:-1]], ids[1:])
    assert float(worse) > entropy


def test_bigram_entropy_of_known_sources(tmp_path: Path) -> None:
    assert bigram_entropy(write_val(tmp_path, [0, 1, 2] * 100)) == 0.0
    assert bigram_entropy(write_val(tmp_path, [0] * 9)) == 0.0
    coin = np.random.default_rng(0).integers(2, size=100_000).tolist()
    assert bigram_entropy(write_val(tmp_path, coin)) == pytest.approx(math.log(2), abs=1e-3)
    ids = [4095, 0, 4095, 4095]  # the largest table: 4095 → 0 and 4095 → 4095 once each
    assert bigram_entropy(write_val(tmp_path, ids)) == pytest.approx(2 * math.log(2) / 3)


def test_bigram_entropy_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"val\.bin holds the token id 4096, .* below 4096"):
        bigram_entropy(write_val(tmp_path, [0, 4096, 0]))
    with pytest.raises(ValueError, match=r"val\.bin has 1 token,"):
        bigram_entropy(write_val(tmp_path, [0]))
    with pytest.raises(FileNotFoundError, match=r"train\.bin"):
        bigram_entropy(tmp_path, "train")
    with pytest.raises(ValueError, match=r"one of \('train', 'val'\), got 'test'"):
        bigram_entropy(tmp_path, "test")


@pytest.mark.parametrize("span", [1 << 22, 2])
def test_bigram_counts(span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "SPAN", span)
    write_val(tmp_path, [0, 1, 1, 1, 2, 0, 1])
    counts = bigram_counts(tmp_path, "val", 4)  # a model may know more tokens than a split holds
    assert counts.dtype == np.int64
    assert counts.tolist() == [[0, 2, 0, 0], [0, 2, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match=r"val\.bin holds the token id 2 at position 4"):
        bigram_counts(tmp_path, "val", 2)
    for vocab_size in (0, 4097):
        with pytest.raises(ValueError, match=rf"vocab_size must lie in \[1, 4096\].*{vocab_size}"):
            bigram_counts(tmp_path, "val", vocab_size)
