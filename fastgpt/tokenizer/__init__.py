"""Tokenizers, loaded from the folder of a data set or chosen by name or path.

    tokenizer = saved_tokenizer("data/shakespeare_char")   # the folder of train.bin
    tokenizer = tokenizer_from("gpt2")                     # or a path: tokenizer.json, x.model, ...
    tokenizer.decode(tokenizer.encode("To be"))           # "To be"

The interface is ``Tokenizer``.
"""

import tempfile
from pathlib import Path
from typing import Any

from fastgpt._files import writing
from fastgpt.tokenizer.base import END_OF_TEXT, TokenIds, Tokenizer
from fastgpt.tokenizer.char import MAX_VOCAB_SIZE, CharTokenizer
from fastgpt.tokenizer.chat import ChatTokenizer, base_in
from fastgpt.tokenizer.subword import (
    GPT2Tokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    gpt2_folder_has_vocabulary,
)

__all__ = [
    "END_OF_TEXT",
    "MAX_VOCAB_SIZE",
    "TOKENIZER_FILES",
    "CharTokenizer",
    "ChatTokenizer",
    "GPT2Tokenizer",
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "TokenIds",
    "Tokenizer",
    "packed",
    "saved_tokenizer",
    "tokenizer_from",
    "tokenizer_in",
    "unpacked",
]

# The files that ``Tokenizer.save`` writes to the folder of a data set.
TOKENIZER_FILES = tuple(
    kind.FILE
    for kind in (
        CharTokenizer,
        GPT2Tokenizer,
        JsonTokenizer,
        SentencePieceTokenizer,
        ChatTokenizer,
    )
)


def saved_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer saved in ``folder``, or None.

    Raises:
        ValueError: there are several, or the file is not usable.
        ImportError: a library that it needs is not installed.
    """
    folder = Path(folder)
    found = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if len(found) > 1:
        raise ValueError(
            f"{folder} has more than one tokenizer: {', '.join(found)}; remove all but the one "
            "that encoded its tokens"
        )
    if not found:
        return None
    path = folder / found[0]
    return CharTokenizer.load(path) if path.name == CharTokenizer.FILE else tokenizer_from(path)


def tokenizer_in(folder: str | Path) -> Tokenizer | None:
    """The tokenizer in a model's folder: a saved one, or GPT-2's vocabulary as two files (see
    ``GPT2Tokenizer``), or None. Raises like both.
    """
    saved = saved_tokenizer(folder)
    if saved is None and gpt2_folder_has_vocabulary(Path(folder)):
        return GPT2Tokenizer(folder)
    return saved


def tokenizer_from(spec: str | Path) -> Tokenizer:
    """The tokenizer that ``spec`` names.

    Args:
        spec: ``"gpt2"``; or the path of a ``tokenizer.json``, of a SentencePiece ``.model``, of a
            ``.tiktoken`` file with GPT-2's vocabulary, or of a folder with any of them or with
            GPT-2's vocabulary as two files (see ``GPT2Tokenizer``).

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is none of these, or not usable.
        ImportError: a library that it needs is not installed.
        ConnectionError: see ``GPT2Tokenizer``.
    """
    path = Path(spec)
    if spec == "gpt2":
        return GPT2Tokenizer()
    if not path.exists():
        raise FileNotFoundError(f"tokenizer must be char, gpt2 or a path, but there is no {path}")
    if path.is_dir():
        tokenizer = tokenizer_in(path)
        if tokenizer is None:
            raise FileNotFoundError(
                f"the folder {path} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}, "
                "encoder.json with vocab.bpe, vocab.json with merges.txt"
            )
        return tokenizer
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.name == ChatTokenizer.FILE:
        return _chat_tokenizer(path)
    if path.suffix == ".tiktoken":
        return GPT2Tokenizer(path)
    if path.suffix == ".json":
        return JsonTokenizer(path)
    raise ValueError(
        f"tokenizer must be char, gpt2, a folder, or a file that ends in .json, .model or "
        f".tiktoken, got {path}"
    )


def _chat_tokenizer(path: Path) -> ChatTokenizer:
    name, data = base_in(path)
    base = unpacked({"tokenizer_file": name, "tokenizer": data})
    assert base is not None
    return ChatTokenizer(base)


def packed(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The entries of a checkpoint for a tokenizer: its characters as str, or its file as bytes."""
    if isinstance(tokenizer, CharTokenizer):
        return {"characters": "".join(tokenizer.itos.values())}
    if tokenizer is None:
        return {}
    return {"tokenizer_file": tokenizer.FILE, "tokenizer": tokenizer.file_bytes}


def unpacked(entries: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer in the entries that ``packed`` returned, or None. Ignores other entries.

    Raises:
        ValueError: the entries are damaged.
        ImportError: a library that it needs is not installed.
    """
    if characters := entries.get("characters"):
        return CharTokenizer(dict(enumerate(characters)))
    if "tokenizer" not in entries:
        return None
    name, data = entries.get("tokenizer_file"), entries["tokenizer"]
    if name not in TOKENIZER_FILES or not isinstance(data, bytes):
        raise ValueError(f"the tokenizer is damaged: {name!r} with {type(data).__name__}")
    with tempfile.TemporaryDirectory() as folder:
        with writing(Path(folder) / name):
            (Path(folder) / name).write_bytes(data)
        return saved_tokenizer(folder)
