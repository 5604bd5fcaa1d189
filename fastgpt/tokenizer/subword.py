"""Tokenizers of tiktoken, tokenizers and sentencepiece, which are imported when needed."""

import base64
import binascii
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt._files import parsed_json
from fastgpt._optional import optional
from fastgpt.tokenizer.base import END_OF_TEXT, Tokenizer, in_utf8

# Files of GPT-2's vocabulary, ids and merges, by OpenAI's and by Hugging Face's names.
_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
# GPT-2's pre-tokenization. Quantifiers are possessive where backtracking cannot help.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>", "[SEP]")


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding by tiktoken. ``decode`` replaces invalid UTF-8 by U+FFFD.

    Args:
        path: the vocabulary, by default downloaded: a ``.tiktoken`` file, or a folder with
            ``encoder.json`` and ``vocab.bpe`` or with ``vocab.json`` and ``merges.txt``. Any
            vocabulary in these formats works.

    Attributes:
        vocab_size: 50,257 for GPT-2's own.

    Raises:
        ImportError: tiktoken is not installed.
        ConnectionError: tiktoken has no cached vocabulary and cannot download it.
        FileNotFoundError: there is no vocabulary at ``path``.
        ValueError: the files are damaged or contradict each other.
    """

    FILE = "gpt2.tiktoken"

    def __init__(self, path: str | Path | None = None) -> None:
        tiktoken = optional("tiktoken", "GPT-2's BPE", "bpe")
        if path is None:
            try:
                self._encoding = tiktoken.get_encoding("gpt2")
            except OSError as error:  # tiktoken's network errors
                raise ConnectionError(
                    f"tiktoken could not get GPT-2's vocabulary: {error}. It is downloaded once; "
                    "offline, set TIKTOKEN_CACHE_DIR to a folder that already has it, or "
                    "--tokenizer to a folder with encoder.json and vocab.bpe"
                ) from error
        else:
            ranks = _gpt2_ranks(Path(path))
            self._encoding = tiktoken.Encoding(
                "gpt2",
                pat_str=_GPT2_PATTERN,
                mergeable_ranks=ranks,
                special_tokens={END_OF_TEXT: len(ranks)},
            )
        self.name = "GPT-2 BPE"
        self.vocab_size: int = self._encoding.n_vocab
        self.end_of_text: int = self._encoding.eot_token
        # tiktoken's format: one line per token, its bytes in base64 and its id
        tokens = map(self._encoding.decode_single_token_bytes, range(self.end_of_text))
        lines = (base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
        self.file_bytes = b"".join(lines)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._encoding.encode(text, allowed_special={END_OF_TEXT})
        return ids

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        # Not encode_to_numpy, which before tiktoken 0.11 did not take special tokens as plain text.
        return np.fromiter(self._encoding.encode_ordinary(in_utf8(text)), np.uint32)

    def _decode(self, ids: npt.NDArray[np.int64]) -> str:
        return str(self._encoding.decode(ids.tolist()))


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``, the format of the tokenizers library and of Hugging Face's models.

    Args:
        path: the file.

    Attributes:
        end_of_text: the first of ``<|endoftext|>``, ``</s>``, ``<|end_of_text|>``, ``<eos>``,
            ``[EOS]``, ``<|im_end|>``, ``[SEP]`` that the vocabulary has.

    Raises:
        ImportError: tokenizers is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a tokenizer.
    """

    FILE = "tokenizer.json"

    def __init__(self, path: str | Path) -> None:
        tokenizers = optional("tokenizers", "a tokenizer.json", "data")
        self.file_bytes = _read(Path(path))
        try:
            self._prompts = tokenizers.Tokenizer.from_buffer(self.file_bytes)
            self._data = tokenizers.Tokenizer.from_buffer(self.file_bytes)
        except ValueError as error:
            raise ValueError(f"{path} is not a usable tokenizer.json: {error}") from error
        for tokenizer in (self._prompts, self._data):  # the file may enable both
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._data.encode_special_tokens = True
        ids = self._prompts.get_vocab()
        if not ids:
            raise ValueError(f"{path} is not a usable tokenizer.json: its vocabulary is empty")
        self.vocab_size: int = max(ids.values()) + 1
        self.end_of_text: int | None = next((ids[n] for n in _END_NAMES if n in ids), None)
        self.name = f"{type(self._data.model).__name__} of {self.vocab_size} tokens"

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._prompts.encode(in_utf8(text), add_special_tokens=False).ids
        return ids

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        (encoding,) = self._data.encode_batch_fast([in_utf8(text)], add_special_tokens=False)
        return np.asarray(encoding.ids, dtype=np.uint32)

    def _decode(self, ids: npt.NDArray[np.int64]) -> str:
        return str(self._prompts.decode(ids.tolist(), skip_special_tokens=False))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, BPE or unigram.

    Args:
        path: the ``.model`` file.

    Raises:
        ImportError: sentencepiece is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a model.
    """

    FILE = "tokenizer.model"

    def __init__(self, path: str | Path) -> None:
        sentencepiece = optional("sentencepiece", "a SentencePiece model", "data")
        self.file_bytes = _read(Path(path))
        self._model: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(self.file_bytes)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a usable SentencePiece model: {error}") from error
        self.vocab_size: int = self._model.vocab_size()
        if not self.vocab_size:
            raise ValueError(f"{path} is not a usable SentencePiece model: it has no pieces")
        end: int = self._model.eos_id()
        self.end_of_text: int | None = end if end >= 0 else None
        self.name = f"SentencePiece of {self.vocab_size} tokens"

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(in_utf8(text))
        return ids

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        return np.asarray(self._model.encode(in_utf8(text)), dtype=np.uint32)

    def _decode(self, ids: npt.NDArray[np.int64]) -> str:
        return str(self._model.decode(ids.tolist()))


def gpt2_folder_has_vocabulary(folder: Path) -> bool:
    """Whether ``GPT2Tokenizer(folder)`` finds its files."""
    return any(all((folder / name).is_file() for name in names) for names in _GPT2_FILES)


def byte_of_character() -> dict[str, int]:
    """The mapping from characters to bytes in the JSON of byte-level vocabularies: printable
    Latin-1 characters are themselves, the other 68 bytes in order are U+0100 and up.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    return path.read_bytes()


def _gpt2_ranks(path: Path) -> dict[bytes, int]:
    """Token → id, for the 256 bytes and the merged tokens in the order of the merges."""
    if path.is_dir():
        ranks = _ranks_of_folder(path)
    else:
        ranks = {}
        for number, line in enumerate(_read(path).splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise ValueError(
                    f"{path} is not a .tiktoken file: line {number} is {line[:40]!r}, but must be "
                    "a token in base64 and its id"
                ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path} has {len(ranks)} tokens, whose ids are not 0 to {len(ranks) - 1}")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{path} has no token for the byte 0x{missing[0]:02x}")
    return ranks


def _ranks_of_folder(folder: Path) -> dict[bytes, int]:
    for ids_name, merges_name in _GPT2_FILES:
        if (folder / ids_name).is_file() and (folder / merges_name).is_file():
            break
    else:
        wanted = " nor ".join(" with ".join(names) for names in _GPT2_FILES)
        raise FileNotFoundError(f"{folder} has no vocabulary in GPT-2's format: neither {wanted}")
    to_byte = byte_of_character()
    try:
        ids = parsed_json((folder / ids_name).read_text(encoding="utf-8"))
        ids.pop(END_OF_TEXT, None)
        ranks = {bytes(to_byte[c] for c in token): int(i) for token, i in ids.items()}
        lines = (folder / merges_name).read_text(encoding="utf-8").splitlines()
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        merges = [bytes(to_byte[c] for c in left + right) for left, right in pairs]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} has no usable {ids_name} and {merges_name}: {error}") from error
    # tiktoken merges in the order of the ids.
    in_order = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    if in_order != merges:
        raise ValueError(
            f"{folder / ids_name} and {folder / merges_name} contradict each other: the ids are "
            "not in the order of the merges"
        )
    return ranks
