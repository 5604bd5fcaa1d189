"""The bigram statistics of a data set against their definitions."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt import _progress
from fastgpt.data.builtin_texts import bigram_counts, bigram_entropy, bigram_loss
from fastgpt.tokenizer import CharTokenizer
from tests.tools.small_runs import data_set


def counts_of(folder: Path, ids: list[int], vocab_size: int) -> np.ndarray:
    np.array(ids, dtype=np.uint16).tofile(folder / "val.bin")
    return bigram_counts(folder, "val", vocab_size)


@pytest.mark.parametrize("span", [1 << 22, 7])
def test_counts_and_entropy_are_the_definition(
    span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "SPAN", span)
    text = "She sells sea shells on the sea shore; the shells she sells are sea shells.\n" * 7
    folder, cut = data_set(tmp_path, text), len(text) * 9 // 10
    itos = CharTokenizer.load(folder / "meta.pkl").itos
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        pairs = Counter(zip(part, part[1:], strict=False))
        firsts = Counter(part[:-1])
        entropy = -sum(n / (len(part) - 1) * math.log(n / firsts[a]) for (a, _), n in pairs.items())
        counts = bigram_counts(folder, split, len(itos) + 2)  # a model's vocabulary may be larger
        assert counts.dtype == np.int64 and counts.sum() == len(part) - 1
        assert {(itos[a], itos[b]): counts[a, b] for a, b in np.argwhere(counts)} == pairs
        assert bigram_entropy(counts) == pytest.approx(entropy, abs=1e-12)


def test_bigram_entropy_of_known_sources(tmp_path: Path) -> None:
    assert bigram_entropy(counts_of(tmp_path, [0, 1, 2] * 100, 3)) == 0.0
    assert bigram_entropy(counts_of(tmp_path, [0] * 9, 1)) == 0.0
    coin = np.random.default_rng(0).integers(2, size=100_000).tolist()
    assert bigram_entropy(counts_of(tmp_path, coin, 2)) == pytest.approx(math.log(2), abs=1e-3)
    ids = [4095, 0, 4095, 4095]  # the largest table: 4095 → 0 and 4095 → 4095 once each
    entropy = bigram_entropy(counts_of(tmp_path, ids, 4096))
    assert entropy == pytest.approx(2 * math.log(2) / 3)


def test_the_loss_of_counts_is_that_of_the_table() -> None:
    """Also beyond 2^24, where float32 skips integers."""
    random = np.random.default_rng(3)
    train, val = random.integers(1 << 40, size=(2, 5, 5))
    train[2] = 0  # a token that occurs only in val
    table = torch.log_softmax(torch.from_numpy(train).double().add(1).log(), dim=1)
    expected = -(torch.from_numpy(val) * table).sum() / val.sum()
    assert bigram_loss(train, val) == pytest.approx(expected.item(), abs=1e-12)
    assert bigram_loss(val, val) == pytest.approx(bigram_entropy(val), abs=1e-9)
    with pytest.raises(ValueError, match="at least one pair of tokens, got none"):
        bigram_loss(train, val * 0)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"val\.bin holds the token id 2 at position 4"):
        counts_of(tmp_path, [0, 1, 1, 1, 2, 0, 1], 2)
    for vocab_size in (0, 4097):
        with pytest.raises(ValueError, match=rf"vocab_size must lie in \[1, 4096\].*{vocab_size}"):
            bigram_counts(tmp_path, "val", vocab_size)
    with pytest.raises(ValueError, match="at least one pair of tokens, got none"):
        bigram_entropy(counts_of(tmp_path, [0], 1))
    with pytest.raises(FileNotFoundError, match=r"train\.bin"):
        bigram_counts(tmp_path, "train", 2)
