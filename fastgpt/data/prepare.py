"""Prepare a data set: stream texts, encode them with several threads, write token files; resumable.

    source = source_of("texts")
    prepare(source, tokenizer_from("gpt2"), "data/texts")

writes ``manifest.json``, the tokenizer, and the token files of each split: ``train.bin``, as
nanoGPT reads it, if one uint16 file is enough, otherwise ``train_000000.bin``, ``train_000001.bin``
and so on, with ``shard_tokens`` ids each except the last. The tokenizer's end-of-text token follows
each document, except in a source that is a single text.

Everything is written to ``out_dir/.prepare`` and renamed at the end. After an interruption the same
call resumes and produces the same bytes. Threads use all cores because tokenizers release Python's
GIL.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fastgpt._files import check_folder, exclusive_lock
from fastgpt._progress import progress_bar
from fastgpt.data.manifest import NAME, Manifest, read_manifest
from fastgpt.data.sources import PIECE, Piece, Source, TextSource
from fastgpt.data.token_writer import ShardWriter, publish
from fastgpt.tokenizer import CharTokenizer, Tokenizer, saved_tokenizer

SHARD_TOKENS = 100_000_000
SEED = 2357  # nanoGPT's
TEXT_VAL_SHARE = 0.1  # nanoGPT's share of one text
DOCUMENTS_VAL_SHARE = 0.01

_WORK = ".prepare"
_BATCH = 1 << 20  # characters per task, unless a single piece is longer

_NONE = np.array([], dtype=np.uint32)

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class _Encoded:
    """The ids of a batch and the number of documents that end in it, by split."""

    ids: dict[str, npt.NDArray[np.integer[Any]]]
    documents: dict[str, int]
    characters: int
    fraction: float | None


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    val_share: float | None = None,
    seed: int = SEED,
    shard_tokens: int | None = None,
    end_of_text: int | None = None,
    workers: int | None = None,
) -> Manifest:
    """Write the tokens of ``source`` as a data set, or resume an interrupted call.

    If ``out_dir`` already has the result of the same arguments, writes nothing and verifies the
    files' checksums.

    Args:
        source: the texts.
        tokenizer: its ids are stored as uint16 if its vocabulary has at most 65,536, else uint32.
        out_dir: the folder of the data set.
        val_share: the share for validation, in (0, 1): of the documents, by default 0.01, or of one
            text's characters, taken from its end, by default 0.1.
        seed: determines which documents are for validation.
        shard_tokens: the length of a token file, at least 1. By default 100,000,000, or for a
            single text at character level enough for one file, as nanoGPT reads only one.
        end_of_text: the id that follows each document, by default the tokenizer's own.
        workers: number of threads, by default one per core that this process may use.

    Raises:
        ValueError: an argument is out of range; the tokenizer has no end of text; ``out_dir`` has
            an unfinished preparation with other arguments, or another process is writing to it; a
            finished file is damaged; a split would be empty; or an error of ``source`` or
            ``tokenizer``.
        NotADirectoryError: ``out_dir`` is a file.
        FileExistsError: ``out_dir`` has another data set or tokenizer.
    """
    out_dir = Path(out_dir)
    one_text = isinstance(source, TextSource)
    if val_share is None:
        val_share = TEXT_VAL_SHARE if one_text else DOCUMENTS_VAL_SHARE
    if not 0 < val_share < 1:
        raise ValueError(f"val_share must lie between 0 and 1, got {val_share}")
    if shard_tokens is None:
        shard_tokens = SHARD_TOKENS
        if isinstance(source, TextSource) and isinstance(tokenizer, CharTokenizer):
            shard_tokens = max(shard_tokens, source.length())
    workers = _cores() if workers is None else workers
    for name, value in (("shard_tokens", shard_tokens), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    eot_token = None if one_text else _eot_token(tokenizer, end_of_text)
    settings = {
        "source": source.identity(),
        "tokenizer": tokenizer.fingerprint,
        "end_of_text": eot_token,
        "val_share": val_share,
        "seed": seed,
        "shard_tokens": shard_tokens,
        "piece": PIECE,
        "batch": _BATCH,
    }
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in a manifest
    check_folder(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out_dir):
        finished = _finished(out_dir, settings, tokenizer)
        if finished is not None:
            return finished
        return _written(source, tokenizer, out_dir, settings, workers)


def _written(
    source: Source,
    tokenizer: Tokenizer,
    out_dir: Path,
    settings: dict[str, Any],
    workers: int,
) -> Manifest:
    def encode(batch: list[Piece]) -> _Encoded:
        return _encode(batch, source, tokenizer, settings["end_of_text"])

    batches = _batches(source.pieces(settings["val_share"], settings["seed"]))
    work = out_dir / _WORK
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writer = ShardWriter(work, settings, dtype, settings["shard_tokens"])
    try:
        # Batches that were already written are read again, but not encoded again.
        left = islice(batches, writer.batches, None)
        for encoded in _shown(_ordered(encode, left, workers)):
            writer.append(encoded.ids, encoded.documents)
        if not writer.batches:
            raise ValueError("the input is empty: it has no text")
        tokenizer.save(work / tokenizer.FILE)
        about = {
            "name": tokenizer.name,
            "file": tokenizer.FILE,
            "fingerprint": tokenizer.fingerprint,
        }
        return writer.finish(out_dir, tokenizer.vocab_size, about)
    finally:
        writer.close()


def characters_of(source: Source) -> CharTokenizer:
    """A tokenizer for all characters of ``source``, which is read once. For a source of documents
    the vocabulary includes the line feed, which follows each document.

    Raises:
        ValueError: there are more than 65,536 characters; or an error of ``source``.
    """
    ends = [] if isinstance(source, TextSource) else ["\n"]
    return CharTokenizer.from_texts(chain(ends, source.texts()))


def _eot_token(tokenizer: Tokenizer, end_of_text: int | None) -> int:
    eot_token = tokenizer.end_of_text if end_of_text is None else end_of_text
    if eot_token is None:
        raise ValueError(
            f"the tokenizer ({tokenizer.name}) has no token to end a document: name one with "
            "--end_of_text"
        )
    if not 0 <= eot_token < tokenizer.vocab_size:
        raise ValueError(f"end_of_text must lie in [0, {tokenizer.vocab_size}), got {eot_token}")
    return eot_token


def _finished(out_dir: Path, settings: dict[str, Any], tokenizer: Tokenizer) -> Manifest | None:
    """The manifest in ``out_dir`` if the same preparation is already finished, else None."""
    found = read_manifest(out_dir)
    if found is None and (out_dir / _WORK / NAME).exists():  # stopped while files were renamed
        found = publish(out_dir / _WORK, out_dir)
    if found is not None:
        if found.settings != settings:
            changed = [key for key in settings if found.settings.get(key) != settings[key]]
            raise FileExistsError(
                f"{out_dir} has a data set with another {', '.join(changed)}; choose another "
                "out_dir or remove it"
            )
        found.verify(out_dir)
        return found
    for name in ("train.bin", "val.bin"):
        if (out_dir / name).exists():
            raise FileExistsError(
                f"{out_dir / name} exists and is not replaced; choose another out_dir or remove it"
            )
    beside = saved_tokenizer(out_dir)
    if beside is not None and beside.fingerprint != tokenizer.fingerprint:
        raise FileExistsError(
            f"{out_dir / beside.FILE} is another tokenizer and is not replaced; choose another "
            "out_dir or remove it"
        )
    return None


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group pieces into batches of about ``_BATCH`` characters."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece.text) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.text)
    if batch:
        yield batch


def _encode(
    batch: list[Piece], source: Source, tokenizer: Tokenizer, eot_token: int | None
) -> _Encoded:
    arrays: dict[str, list[npt.NDArray[np.integer[Any]]]] = {"train": [], "val": []}
    documents = {"train": 0, "val": 0}
    for piece in batch:
        arrays[piece.split].append(source.tokens(piece, tokenizer, eot_token))
        documents[piece.split] += piece.ends_document
    return _Encoded(
        {split: np.concatenate([_NONE, *parts]) for split, parts in arrays.items()},
        documents,
        sum(len(piece.text) for piece in batch),
        batch[-1].fraction,
    )


def _ordered(work: Callable[[_T], _R], items: Iterable[_T], workers: int) -> Iterator[_R]:
    """``map(work, items)`` in threads, at most ``2 * workers`` items ahead of the consumer."""
    pending: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _shown(batches: Iterable[_Encoded]) -> Iterator[_Encoded]:
    """The same batches, with a progress bar."""
    started, characters, tokens = time.monotonic(), 0, 0
    with progress_bar("Encoding") as show:
        for encoded in batches:
            yield encoded
            characters += encoded.characters
            tokens += sum(map(len, encoded.ids.values()))
            speed = characters / 1e6 / (time.monotonic() - started + 1e-9)
            show(encoded.fraction, f"{tokens:,} tokens, {speed:.1f} M characters/s")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
