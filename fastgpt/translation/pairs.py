"""Parallel texts: reading, holding out for validation, encoding, batches by number of tokens."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fastgpt.data.batches import padded
from fastgpt.data.file_formats import naming, read_text
from fastgpt.seq2seq import PADDING
from fastgpt.tokenizer import Tokenizer
from fastgpt.translation.built_in import Pairs

Ids = list[int]  # with the end token
IdPairs = list[tuple[Ids, Ids]]


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file.

    Raises FileNotFoundError, or ValueError if the file is empty or not UTF-8, or, naming the line,
    if a line is empty.
    """
    text = "".join(part for part, _ in read_text(path))
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not text.strip():
        raise ValueError(f"{path} is empty")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{path}:{number} is empty: every line must have a text")
    return lines


def read_two_files(source: Path, target: Path) -> Pairs:
    """Pairs from line n of ``source`` and line n of ``target``. Raises like ``read_lines``."""
    sources, targets = read_lines(source), read_lines(target)
    if len(sources) != len(targets):
        raise ValueError(
            f"{source} has {len(sources)} lines and {target} has {len(targets)}: line n of one "
            "must translate line n of the other"
        )
    return list(zip(sources, targets, strict=True))


def read_tsv(path: Path) -> Pairs:
    """Pairs from lines of source, tab, target. Raises like ``read_lines``."""
    pairs = []
    for number, line in enumerate(read_lines(path), start=1):
        texts = line.split("\t")
        if len(texts) != 2 or not all(text.strip() for text in texts):
            raise ValueError(
                f"{path}:{number} must be a text, a tab and its translation, got {line!r}"
            )
        pairs.append((texts[0], texts[1]))
    return pairs


def hold_out(pairs: Pairs, n_held_out: int, seed: int) -> tuple[Pairs, Pairs]:
    """Split into pairs for training and for validation. The latter have ``n_held_out`` randomly
    chosen distinct sources, which do not occur in training."""
    sources = sorted({source for source, _ in pairs})
    if len(sources) < 2:
        raise ValueError(
            "a parallel text must have at least two different sources, one to hold out, got "
            f"{len(sources)}"
        )
    if not 1 <= n_held_out < len(sources):
        raise ValueError(
            f"held_out must lie in [1, {len(sources) - 1}] for {len(sources)} different sources, "
            f"got {n_held_out}"
        )
    held_out = set(random.Random(seed).sample(sources, n_held_out))
    train = [pair for pair in pairs if pair[0] not in held_out]
    return train, [pair for pair in pairs if pair[0] in held_out]


def encoded(text: str, tokenizer: Tokenizer, max_length: int, where: str) -> Ids:
    """The ids of a text, followed by the end token, whose id is the tokenizer's vocab_size.

    Raises ValueError naming ``where`` for an unknown character or more than ``max_length`` ids.
    """
    with naming(where):
        ids: Ids = tokenizer.encode_array(text).tolist()
    if len(ids) >= max_length:
        raise ValueError(
            f"{where} has {len(ids)} tokens and an end token, more than max_length {max_length}"
        )
    return [*ids, tokenizer.vocab_size]


def encoded_pairs(
    pairs: Pairs, tokenizers: tuple[Tokenizer, Tokenizer], max_length: int
) -> IdPairs:
    """``encoded`` for pairs, with the tokenizers of sources and targets."""
    return [
        (
            encoded(source, tokenizers[0], max_length, f"source {source[:40]!r}"),
            encoded(target, tokenizers[1], max_length, f"target {target[:40]!r}"),
        )
        for source, target in pairs
    ]


def cut_by_tokens(lengths: Iterable[int], batch_tokens: int) -> list[int]:
    """The starts of batches of consecutive texts with these lengths, which must be ascending. Each
    batch has at most ``batch_tokens`` tokens, including padding, and at least one text."""
    starts = [0]
    for i, length in enumerate(lengths):
        if i > starts[-1] and (i + 1 - starts[-1]) * length > batch_tokens:
            starts.append(i)
    return starts


class Batch(NamedTuple):
    source: Tensor  # (B, S), int64
    target: Tensor  # (B, T), int64


class Batches:
    """Batches of pairs with similar lengths, to minimize padding. ``batch_tokens`` limits the
    tokens on the longer side, including padding.

    Batch i depends only on the seed and i, so that a resumed run continues with the same data. Each
    epoch shuffles the pairs of equal lengths and the order of the batches.
    """

    def __init__(self, pairs: IdPairs, batch_tokens: int, seed: int) -> None:
        self._sorted = sorted(pairs, key=_lengths)
        lengths = [_lengths(pair)[0] for pair in self._sorted]
        starts = cut_by_tokens(lengths, batch_tokens)
        self._slices = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
        self._seed = seed
        self._epoch, self._shuffled, self._order = -1, self._sorted, list[int]()

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return len(self._slices)

    def in_order(self) -> Iterator[Batch]:
        """The batches of an epoch, from the shortest pairs to the longest."""
        return (_batch(self._sorted[part]) for part in self._slices)

    def padding(self) -> float:
        """The share of padding among the tokens of an epoch."""
        sides = [side for batch in self.in_order() for side in batch]
        n_padding = sum(int((side == PADDING).sum()) for side in sides)
        return n_padding / sum(side.numel() for side in sides)

    def __getitem__(self, i: int) -> Batch:
        """Batch i of a training run, which may pass over the pairs many times."""
        epoch, position = divmod(i, len(self))
        if epoch != self._epoch:
            draw = random.Random(f"{self._seed} {epoch}")
            self._shuffled = sorted(draw.sample(self._sorted, len(self._sorted)), key=_lengths)
            self._order = draw.sample(range(len(self)), len(self))
            self._epoch = epoch
        return _batch(self._shuffled[self._slices[self._order[position]]])


def _batch(pairs: IdPairs) -> Batch:
    sources, targets = zip(*pairs, strict=True)
    return Batch(padded(sources, PADDING), padded(targets, PADDING))


def _lengths(pair: tuple[Ids, Ids]) -> tuple[int, int, int]:
    source, target = map(len, pair)
    return max(source, target), target, source
