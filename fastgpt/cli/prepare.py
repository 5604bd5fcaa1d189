"""The commands ``fastgpt prepare`` and ``fastgpt tokenizer``."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from fastgpt._files import check_folder
from fastgpt.assistant.dialogues import DIALOGUES_VAL_SHARE, DialogueSource
from fastgpt.data import builtin_texts
from fastgpt.data.file_formats import decompressed
from fastgpt.data.manifest import Manifest
from fastgpt.data.prepare import (
    DOCUMENTS_VAL_SHARE,
    SEED,
    SHARD_TOKENS,
    TEXT_VAL_SHARE,
    characters_of,
    prepare,
)
from fastgpt.data.sources import DatasetSource, Source, TextSource, source_of
from fastgpt.tokenizer import ChatTokenizer, Tokenizer, tokenizer_from
from fastgpt.tokenizer.training import train_tokenizer
from fastgpt.training.config import Limited

BUILTIN = "builtin"
_SHAKESPEARE = "shakespeare_char"
_CHARACTERS = "char"


def shown(metavar: str | None, default: str) -> Any:
    """How ``--help`` shows an option's value and its default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True, kw_only=True)
class Prepare(Limited):
    """Make a data set from texts.

    By default at character level, in nanoGPT's format. Inputs of any size are streamed and encoded
    on all cores. After an interruption, the same command resumes.
    """

    # builtin: the sources of this Python's standard library. shakespeare: Tiny Shakespeare,
    # downloaded (1.1 MB).
    corpus: Annotated[
        tyro.conf.Positional[Literal["builtin", "shakespeare"] | None],
        shown("[builtin|shakespeare]", "builtin"),
    ] = None
    # Your own texts instead of a corpus: a UTF-8 text, .jsonl (or .ndjson, or .json with one object
    # per line), .parquet, any of them as .gz or .zst, or a folder of such files. Each text file in
    # a folder, each line and each row is a document.
    input: Annotated[Path | None, shown("PATH", "none")] = None
    # Dialogues for training an assistant, instead of a corpus: a .jsonl whose lines are
    # {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]},
    # optionally with a first message of the role system. --tokenizer: the base model's.
    dialogues: Annotated[Path | None, shown("FILE", "none")] = None
    # A Hugging Face data set, streamed, instead of a corpus.
    hf_dataset: Annotated[str | None, shown("NAME", "none")] = None
    # The configuration of --hf_dataset.
    hf_config: Annotated[str | None, shown("NAME", "none")] = None
    # The split of --hf_dataset.
    hf_split: Annotated[str | None, shown("NAME", "train")] = None
    # The key of a JSON line, or column of a row, that holds the text.
    text_key: Annotated[str | None, shown("KEY", "text")] = None
    # char: one token per character. gpt2: GPT-2's BPE. PATH: a tokenizer.json, a
    # SentencePiece .model, a .tiktoken file, or a folder with one of them or with encoder.json and
    # vocab.bpe.
    tokenizer: Annotated[str, tyro.conf.arg(metavar="char|gpt2|PATH")] = _CHARACTERS
    # Folder for the tokens and the tokenizer.
    out_dir: Annotated[
        Path | None,
        shown("DIR", "data/builtin, data/shakespeare_char or data/NAME of the input"),
    ] = None
    # Share for validation: random documents, or the end of a single text.
    val_share: Annotated[
        float | None,
        shown(
            "SHARE",
            f"{DOCUMENTS_VAL_SHARE} of documents, {DIALOGUES_VAL_SHARE} of dialogues, "
            f"{TEXT_VAL_SHARE} of one text",
        ),
    ] = None
    # Seed for choosing the validation documents.
    seed: Annotated[int | None, shown("N", str(SEED))] = None
    # The token that ends each document.
    end_of_text: Annotated[
        str | None,
        shown("TOKEN", "the tokenizer's, such as <|endoftext|>; a line feed with char"),
    ] = None
    # Maximum number of tokens per file.
    shard_tokens: Annotated[
        int | None, shown("N", f"{SHARD_TOKENS}; a single text at character level is one file")
    ] = None
    # Number of encoding threads.
    workers: Annotated[int | None, shown("N", "one per core")] = None


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer(Limited):
    """Train a tokenizer on texts: fastgpt tokenizer train --input PATH --out_dir DIR.

    Then use it: fastgpt prepare --tokenizer DIR --input PATH.
    """

    # The only action.
    action: tyro.conf.Positional[Literal["train"]]
    # A UTF-8 text, .jsonl, .parquet, any of them as .gz or .zst, or a folder.
    input: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    # Folder for tokenizer.json (bpe) or tokenizer.model.
    out_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    # bpe: byte-level byte-pair encoding, like GPT-2's. unigram: SentencePiece's.
    kind: Literal["bpe", "unigram"] = "bpe"
    # Vocabulary size, at least 257.
    vocab_size: Annotated[int, tyro.conf.arg(metavar="N")] = 32768
    # The key of a JSON line, or column of a row, that holds the text.
    text_key: Annotated[str, tyro.conf.arg(metavar="KEY")] = "text"


def run_prepare(command: Prepare, console: Console) -> None:
    """Prepare a data set and print a summary."""
    inputs = {
        "a corpus": command.corpus,
        "--input": command.input,
        "--dialogues": command.dialogues,
        "--hf_dataset": command.hf_dataset,
    }
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"give {' or '.join(given)}, not both: got "
            + " and ".join(str(inputs[name]) for name in given)
        )
    if command.hf_dataset is None and (command.hf_config or command.hf_split):
        raise ValueError("--hf_config and --hf_split need --hf_dataset")
    if command.hf_dataset == "":
        raise ValueError("hf_dataset must be the name of a data set, got ''")
    out_dir = command.out_dir or _default_out_dir(command)
    check_folder(out_dir)  # before anything is downloaded
    source = _source(command)
    if command.text_key is not None and isinstance(source, (DialogueSource, TextSource)):
        of_dialogues = isinstance(source, DialogueSource)
        why = "dialogues are under messages" if of_dialogues else "one text has no keys"
        raise ValueError(f"--text_key={command.text_key} has no use: {why}")
    tokenizer = (
        characters_of(source)
        if command.tokenizer == _CHARACTERS
        else tokenizer_from(command.tokenizer)
    )
    val_share = command.val_share
    if isinstance(source, DialogueSource):
        if command.end_of_text is not None:
            raise ValueError(
                f"--end_of_text={command.end_of_text} has no use: a dialogue has its own tokens"
            )
        val_share = DIALOGUES_VAL_SHARE if val_share is None else val_share
        tokenizer = tokenizer if isinstance(tokenizer, ChatTokenizer) else ChatTokenizer(tokenizer)
    for name in ("seed", "end_of_text"):
        value = getattr(command, name)
        if value is not None and isinstance(source, TextSource):
            raise ValueError(f"--{name}={value} has no use: one text is not split into documents")
    end = command.end_of_text
    try:
        manifest = prepare(
            source,
            tokenizer,
            out_dir,
            val_share=val_share,
            seed=SEED if command.seed is None else command.seed,
            shard_tokens=command.shard_tokens,
            end_of_text=None if end is None else _one_token(tokenizer, end),
            workers=command.workers,
        )
    except KeyboardInterrupt:
        console.print("stopped; the same command continues from here")
        raise
    report_prepared(out_dir, manifest, console)
    where = (
        "" if out_dir.parent == Path("data") else f" --data_root={shlex.quote(str(out_dir.parent))}"
    )
    base = " --init_from=FOLDER" if command.dialogues is not None else ""
    console.print(f"train on it: fastgpt train{where} --dataset={shlex.quote(out_dir.name)}{base}")


def report_prepared(data_dir: Path, manifest: Manifest, console: Console) -> None:
    """Print one line about a data set."""
    parts = ", ".join(
        f"{split.tokens:,} tokens for {'training' if name == 'train' else 'validation'} "
        f"({len(split.shards)} {'file' if len(split.shards) == 1 else 'files'})"
        for name, split in manifest.splits.items()
    )
    console.print(
        f"prepared {data_dir}: {manifest.tokenizer['name']}, vocabulary of {manifest.vocab_size}, "
        f"{parts}, {manifest.dtype}"
    )


def run_train_tokenizer(command: TrainTokenizer, console: Console) -> None:
    """Train a tokenizer and print its file and how to use it."""
    source = source_of(command.input, command.text_key)
    tokenizer = train_tokenizer(source, command.kind, command.vocab_size, command.out_dir)
    out_dir, texts = (shlex.quote(str(path)) for path in (command.out_dir, command.input))
    console.print(
        f"wrote {command.out_dir / tokenizer.FILE}: {tokenizer.name}\n"
        f"use it: fastgpt prepare --tokenizer {out_dir} --input {texts}"
    )


def _default_out_dir(command: Prepare) -> Path:
    if command.input is not None:
        path = decompressed(command.input.resolve())
        return Path("data") / (path.name if path.is_dir() else path.stem)
    if command.dialogues is not None:
        return Path("data") / decompressed(command.dialogues.resolve()).stem
    if command.hf_dataset is not None:
        return Path("data") / command.hf_dataset.rstrip("/").rpartition("/")[2]
    name = command.corpus or BUILTIN
    if command.tokenizer == _CHARACTERS:
        return Path("data") / (_SHAKESPEARE if name == "shakespeare" else name)
    return Path("data") / ("builtin_bpe" if name == BUILTIN else name)


def _source(command: Prepare) -> Source:
    text_key = command.text_key or "text"
    if command.hf_dataset is not None:
        split = command.hf_split or "train"
        return DatasetSource(command.hf_dataset, command.hf_config, split, text_key)
    if command.input is not None:
        return source_of(command.input, text_key)
    if command.dialogues is not None:
        return DialogueSource(command.dialogues)
    if command.corpus == "shakespeare":
        return TextSource(builtin_texts.shakespeare_text())
    return TextSource(builtin_texts.builtin_text())


def _one_token(tokenizer: Tokenizer, token: str) -> int:
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise ValueError(f"end_of_text must be one token, but {token!r} is {len(ids)}")
    return ids[0]
