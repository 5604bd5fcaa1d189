"""Texts for users who have none, and bigram statistics of a data set.

prepare_builtin("data/builtin")              # the running Python's standard library
TextSource(shakespeare_text())               # Tiny Shakespeare, downloaded
counts = bigram_counts("data/builtin", "val", 96)
bigram_entropy(counts)                       # nats per token
bigram_loss(bigram_counts("data/builtin", "train", 96), counts)   # of the table counted on train
"""

import hashlib
import http.client
import sys
import sysconfig
import urllib.request
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastgpt._progress import spans
from fastgpt.data.batches import token_files
from fastgpt.data.manifest import Manifest
from fastgpt.data.prepare import characters_of, prepare
from fastgpt.data.sources import TextSource

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

MAX_BIGRAM_VOCAB_SIZE = 4096  # a table of 4096 x 4096 counts takes 128 MB
_TIMEOUT_S = 30.0  # without data from the server


def prepare_builtin(out_dir: str | Path) -> Manifest:
    """Write the built-in text as a character-level data set. Raises like ``builtin_text`` and
    ``prepare``.
    """
    source = TextSource(builtin_text())
    return prepare(source, characters_of(source), out_dir)


def builtin_text() -> str:
    """The built-in corpus: real text that every machine with Python has.

    The concatenated sources of the standard library's modules in the order of their names: every
    module in ``sys.stdlib_module_names`` that is a single file, ``<stdlib>/<name>.py``, and pure
    ASCII. This excludes packages, tests and files that a distribution generates, so the same Python
    version gives the same text everywhere: about 4.4 MB.

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
            "use your own text: fastgpt prepare --input FILE"
        )
    return text


def shakespeare_text(url: str = SHAKESPEARE_URL) -> str:
    """Download Tiny Shakespeare and check its size and SHA-256.

    Raises:
        ConnectionError: the file cannot be downloaded from ``url``.
        ValueError: it is a different file.
    """
    data = _download(url, SHAKESPEARE_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{url} is not Tiny Shakespeare: its SHA-256 is {digest}, expected {SHAKESPEARE_SHA256}"
        )
    return data.decode("ascii")


def bigram_counts(data_dir: str | Path, split: str, vocab_size: int) -> npt.NDArray[np.int64]:
    """Counts of token pairs within a split: entry [a, b] of a (V, V) table counts b after a.

    Args:
        data_dir: the folder of the data set.
        split: "train" or "val".
        vocab_size: V, at most 4096.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: ``vocab_size`` is out of range, or the file has an id that is not below it.
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


def bigram_entropy(counts: npt.NDArray[np.int64]) -> float:
    """The empirical conditional entropy H(next | current) of ``bigram_counts``, in nats per token.

    No model that only sees the current token can have a lower loss on that split.

    Raises:
        ValueError: the table is empty, as for a split of 1 token.
    """
    if not counts.any():
        raise ValueError("counts must hold at least one pair of tokens, got none")
    # H = -sum_ab p(ab) log(n_ab / n_a)
    return (_sum_n_log_n(counts.sum(1)) - _sum_n_log_n(counts)) / float(counts.sum())


def bigram_loss(train: npt.NDArray[np.int64], val: npt.NDArray[np.int64]) -> float:
    """The mean loss in nats per token, over all pairs counted in ``val``, of the table that
    predicts b after a with probability (train[a, b] + 1) / (sum of train[a] + V). It is at least
    the entropy of ``val``.

    Raises:
        ValueError: ``val`` is empty, as for a split of 1 token.
    """
    if not val.any():
        raise ValueError("val must hold at least one pair of tokens, got none")
    log_p = np.log(train + 1.0) - np.log(train.sum(1, keepdims=True) + float(len(train)))
    return -float((val * log_p).sum()) / float(val.sum())


def _sum_n_log_n(counts: npt.NDArray[np.int64]) -> float:
    n = counts[counts > 0].astype(np.float64)
    return float((n * np.log(n)).sum())


def _download(url: str, size: int) -> bytes:
    """Download ``size`` bytes; ConnectionError if there are more or fewer."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            data: bytes = response.read(size + 1)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"could not download {url}: {str(error).strip()}. Without a connection, use your own "
            "text: fastgpt prepare --input FILE"
        ) from error
    if len(data) != size:
        got = f"more than {size}" if len(data) > size else f"{len(data)}"
        raise ConnectionError(f"{url} sent {got} bytes instead of {size}; try again")
    return data
