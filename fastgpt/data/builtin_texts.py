"""Corpora: get a text, write it as a character-level data set in nanoGPT's format.

    prepare_builtin("data/builtin")              # the running Python's standard library
    prepare_file("my.txt", "data/my")            # any UTF-8 text
    prepare_shakespeare("data/shakespeare")      # Tiny Shakespeare, downloaded
    bigram_counts("data/builtin", "train", 96)   # a (96, 96) table
    bigram_entropy("data/builtin")               # nats per token

Each ``prepare_*`` returns a ``Prepared`` and leaves ``train.bin`` (the first 90% of the
characters), ``val.bin`` (the rest) and ``meta.pkl``. They are written aside and renamed together at
the end: a failure leaves an earlier preparation as it was. No text is changed, not even its line
ends.
"""

import hashlib
import http.client
import os
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastgpt._progress import spans
from fastgpt.data.batches import token_files
from fastgpt.data.file_formats import read_text
from fastgpt.data.manifest import NAME
from fastgpt.tokenizer import CharTokenizer

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

MIN_CHARACTERS = 11  # the shortest text whose last tenth still has an input and a target
MAX_BIGRAM_VOCAB_SIZE = 4096  # a table of 4096 x 4096 counts takes 128 MB
_TIMEOUT_S = 30.0  # without a byte from the server


@dataclass(frozen=True)
class Prepared:
    """A data set that was written.

    Attributes:
        data_dir: the folder with ``train.bin``, ``val.bin`` and ``meta.pkl``.
        vocab_size: the number of distinct characters.
        train_tokens: the number of ids in ``train.bin``.
        val_tokens: the number of ids in ``val.bin``.
    """

    data_dir: Path
    vocab_size: int
    train_tokens: int
    val_tokens: int


def prepare_text(text: str, out_dir: str | Path) -> Prepared:
    """Write ``text`` as a data set.

    Raises:
        ValueError: the text has fewer than 11 characters or more than 65,536 distinct ones.
        NotADirectoryError: ``out_dir`` is a file.
        FileExistsError: ``out_dir`` holds a ``train.bin`` or ``val.bin`` without a ``meta.pkl``, or
            a ``manifest.json``: tokens that could have taken hours to make.
    """
    return _prepare(lambda: (text[span] for span in spans(len(text), "Reading")), out_dir)


def prepare_file(path: str | Path, out_dir: str | Path) -> Prepared:
    """Write the UTF-8 text in ``path`` as a data set. It is read twice, a few MB at a time.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: it is empty, or not UTF-8 (the message has the position of the byte); or see
            ``prepare_text``, whose other errors apply too.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"the input {path} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"the input {path} is a folder, but must be one UTF-8 text file")
    if not path.stat().st_size:
        raise ValueError(f"the input {path} is empty")
    return _prepare(lambda: (text for text, _ in read_text(path)), out_dir)


def _prepare(read: Callable[[], Iterator[str]], out_dir: str | Path) -> Prepared:
    """Write the text whose parts ``read`` gives, the same ones at every call."""
    length = sum(map(len, read()))
    if length < MIN_CHARACTERS:
        raise ValueError(
            f"the text has {length} characters, but needs at least {MIN_CHARACTERS} to be split "
            "into 90% for training and the rest for validation"
        )
    out_dir = Path(out_dir)
    _check_out_dir(out_dir)
    tokenizer = CharTokenizer.from_texts(read())
    split = length * 9 // 10
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=out_dir) as temporary:
        aside = Path(temporary)
        with (aside / "train.bin").open("wb") as train, (aside / "val.bin").open("wb") as val:
            position = 0
            for part in read():
                ids = tokenizer.encode_array(part)
                cut = max(split - position, 0)
                ids[:cut].tofile(train)
                ids[cut:].tofile(val)
                position += len(part)
        tokenizer.save(aside / "meta.pkl")
        for name in ("train.bin", "val.bin", "meta.pkl"):
            os.replace(aside / name, out_dir / name)
    return Prepared(out_dir, tokenizer.vocab_size, split, length - split)


def prepare_builtin(out_dir: str | Path) -> Prepared:
    """Write the built-in corpus as a data set: see ``builtin_text``."""
    return prepare_text(builtin_text(), out_dir)


def builtin_text() -> str:
    """The built-in corpus: real text that every machine with Python has.

    It is the standard library's sources, joined in the order of their names: of every module in
    ``sys.stdlib_module_names`` that is one file, ``<stdlib>/<name>.py``, those that are pure ASCII.
    Packages, tests, site-packages and files that a distribution generates are no such modules. The
    text is the same wherever the same Python stands: about 4.4 MB.

    Raises:
        FileNotFoundError: this Python has no such sources (a zipped standard library, say).
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    paths = [stdlib / f"{name}.py" for name in sorted(sys.stdlib_module_names)]
    sources = [path.read_bytes() for path in paths if path.is_file()]
    text = b"".join(source for source in sources if source.isascii()).decode("ascii")
    if not text:
        raise FileNotFoundError(
            f"the built-in corpus needs the standard library's sources, but {stdlib} has none; "
            "use a text of your own: fastgpt prepare --input FILE"
        )
    return text


def prepare_shakespeare(out_dir: str | Path, url: str = SHAKESPEARE_URL) -> Prepared:
    """Download Tiny Shakespeare and write it as a data set: 65 characters, 1,003,854 tokens for
    training and 111,540 for validation. Errors: see ``shakespeare_text``; nothing is downloaded
    where ``out_dir`` cannot be written.
    """
    _check_out_dir(Path(out_dir))
    return prepare_text(shakespeare_text(url), out_dir)


def shakespeare_text(url: str = SHAKESPEARE_URL) -> str:
    """Download Tiny Shakespeare, into memory, until its size and SHA-256 are known to be right.

    Raises:
        ConnectionError: the file cannot be had from ``url``.
        ValueError: what came is not Tiny Shakespeare.
    """
    data = _download(url, SHAKESPEARE_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{url} is not Tiny Shakespeare: its SHA-256 is {digest}, expected {SHAKESPEARE_SHA256}"
        )
    return data.decode("ascii")


def bigram_counts(data_dir: str | Path, split: str, vocab_size: int) -> npt.NDArray[np.int64]:
    """How often token b follows token a within a split: entry [a, b] of a (V, V) table.

    Args:
        data_dir: the folder of the data set.
        split: "train" or "val".
        vocab_size: V, at most 4096.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: ``vocab_size`` is out of range, or the file holds an id that is not below it.
    """
    if not 1 <= vocab_size <= MAX_BIGRAM_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must lie in [1, {MAX_BIGRAM_VOCAB_SIZE}] for a table of bigrams, "
            f"got {vocab_size}"
        )
    counts = np.zeros(vocab_size * vocab_size, dtype=np.int64)
    for file in token_files(data_dir, split):
        file.check_ids(vocab_size)
        for span in spans(len(file) - 1, f"Counting bigrams of {file.path.name}"):
            current = file.tokens[span].astype(np.int64)
            following = file.tokens[span.start + 1 : span.stop + 1]
            counts += np.bincount(current * vocab_size + following, minlength=len(counts))
    return counts.reshape(vocab_size, vocab_size)


def bigram_entropy(data_dir: str | Path, split: str = "val") -> float:
    """The empirical entropy of a token given the one before it, H(next | current), in nats.

    It is taken over the neighbours within one split. No model that sees the current token alone
    can have a lower loss on that split: a loss below it needs a longer context.

    Args:
        data_dir: the folder of the data set.
        split: "train" or "val".

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it has fewer than 2 tokens, or an id of 4096 or more.
    """
    files = token_files(data_dir, split)
    pairs = sum(len(file) - 1 for file in files)
    if not pairs:
        raise ValueError(f"{files[0].path} has 1 token, but a bigram needs at least 2")
    largest = 0
    for file in files:
        for span in spans(len(file), "Finding ids"):
            largest = max(largest, int(file.tokens[span].max()))
        if largest >= MAX_BIGRAM_VOCAB_SIZE:
            raise ValueError(
                f"{file.path} holds the token id {largest}, but a table of bigrams takes ids below "
                f"{MAX_BIGRAM_VOCAB_SIZE}"
            )
    counts = bigram_counts(data_dir, split, largest + 1)
    # H = -sum_ab p(ab) log(n_ab / n_a)
    return (_sum_n_log_n(counts.sum(1)) - _sum_n_log_n(counts)) / pairs


def _sum_n_log_n(counts: np.ndarray) -> float:
    n = counts[counts > 0].astype(np.float64)
    return float((n * np.log(n)).sum())


def _check_out_dir(out_dir: Path) -> None:
    if out_dir.exists() and not out_dir.is_dir():
        raise NotADirectoryError(f"out_dir must be a folder, but {out_dir} is a file")
    if (out_dir / NAME).exists():
        raise FileExistsError(
            f"{out_dir} holds a data set with a {NAME}, which is not replaced; choose another "
            "out_dir or remove it"
        )
    if (out_dir / "meta.pkl").exists():
        return
    for name in ("train.bin", "val.bin"):
        if (out_dir / name).exists():
            raise FileExistsError(
                f"{out_dir / name} exists without a meta.pkl, so it was not made by "
                "'fastgpt prepare' and is not replaced; choose another out_dir or remove it"
            )


def _download(url: str, size: int) -> bytes:
    """The ``size`` bytes at ``url``: more or fewer are an error."""
    from rich.console import Console
    from rich.progress import wrap_file

    try:
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response,
            wrap_file(
                response,
                size,
                description="Downloading",
                console=Console(stderr=True),
                transient=True,
            ) as reader,
        ):
            data = bytearray()
            while len(data) <= size and (chunk := reader.read(1 << 16)):
                data += chunk
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"could not download {url}: {error}. Without a connection, use a text of your own: "
            "fastgpt prepare --input FILE"
        ) from error
    if len(data) != size:
        got = f"more than {size}" if len(data) > size else f"{len(data)}"
        raise ConnectionError(f"{url} sent {got} bytes instead of {size}; try again")
    return bytes(data)
