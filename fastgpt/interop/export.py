"""``fastgpt export``: write a model of ours, nanoGPT's or Hugging Face's for other programs.

| ``to`` | output | readers |
|---|---|---|
| hf | folder: config.json, model.safetensors, tokenizer | transformers, ``GPT.from_pretrained`` |
| safetensors | one file, named as ``GPT.state_dict()``; tokenizer | ``GPT.from_pretrained`` |
| nanogpt | folder: ckpt.pt | nanoGPT, ``fastgpt`` |
"""

import base64
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fastgpt._files import atomic_write, check_folder, writing
from fastgpt._optional import optional
from fastgpt.interop import huggingface
from fastgpt.model import GPT, published_name
from fastgpt.tokenizer import (
    END_OF_TEXT,
    CharTokenizer,
    ChatTokenizer,
    GPT2Tokenizer,
    JsonTokenizer,
    Tokenizer,
    saved_tokenizer,
    tokenizer_in,
)
from fastgpt.tokenizer.chat import SPECIAL_TOKENS
from fastgpt.tokenizer.subword import byte_of_character
from fastgpt.training import checkpoint as ckpt
from fastgpt.training import checkpoint_folder

# ``assistant.template`` as a Jinja template for transformers' apply_chat_template.
CHAT_TEMPLATE = (
    "<|dialogue|>{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_DEFAULT_NAMES = {"hf": "hf", "safetensors": "model.safetensors", "nanogpt": "nanogpt"}
_NANOGPT_KEYS = ("optimizer", "iter_num", "best_val_loss", "config")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a trained model for other programs."""

    # hf: a folder for transformers. safetensors: a file, with the tokenizer in the same folder.
    # nanogpt: a folder with a ckpt.pt.
    to: Literal["hf", "safetensors", "nanogpt"]
    # resume (ckpt.pt in out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the path of a folder
    # or file written by `export` or transformers.
    init_from: str = "resume"
    # Folder of the checkpoint.
    out_dir: str = "out"
    # Where to write; must not exist yet.
    output: Path | None = None


@dataclass(frozen=True)
class Exported:
    """The path written by ``export``, and notes for the user."""

    path: Path
    notes: list[str]


@dataclass(frozen=True)
class _Source:
    model: GPT
    name: str
    find_tokenizer: Callable[[], Tokenizer | None]
    training: dict[str, Any]  # the other entries of a nanoGPT checkpoint
    notes: list[str] = field(default_factory=list)


def export(config: ExportConfig) -> Exported:
    """Write the model, atomically.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        FileExistsError: the output exists.
        NotADirectoryError: ``out_dir``, or a folder of the output, is a file.
        ValueError: the checkpoint is damaged, or not a GPT.
        ImportError: a package is missing.
        OSError: the output cannot be written; no part of it is left.
    """
    output = config.output or Path(config.out_dir) / _DEFAULT_NAMES[config.to]
    if output.exists():
        raise FileExistsError(f"output {output} exists; remove it, or name another")
    if config.output is not None:
        check_folder(output.parent, "output must lie in a folder")
    source = _source(config)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    _remove(temporary)
    write = {"hf": _write_hf, "safetensors": _write_safetensors, "nanogpt": _write_nanogpt}
    try:
        with writing(output):
            notes = source.notes + write[config.to](source, temporary)
            os.rename(temporary, output)
    finally:
        _remove(temporary)
    return Exported(output, notes)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _source(config: ExportConfig) -> _Source:
    if config.init_from == "resume":
        path, note = checkpoint_folder.for_sampling(Path(config.out_dir))
        saved = ckpt.load(path)
        model = ckpt.build_model(saved, path)
        if not isinstance(model, GPT):
            raise ValueError(f"{path} holds a {ckpt.kind(model)}: only a gpt can be exported")
        training = {key: saved[key] for key in _NANOGPT_KEYS if key in saved}
        return _Source(
            model,
            str(path),
            lambda: ckpt.tokenizer_of(saved, path),
            training,
            [note] if note else [],
        )
    model, name = GPT.from_pretrained(config.init_from), config.init_from
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")  # nanoGPT's defaults
    training = {
        "optimizer": optimizer.state_dict(),
        "iter_num": 0,
        "best_val_loss": torch.tensor(1e9),
        "config": {},
    }
    if published_name(name):
        return _Source(model, name, GPT2Tokenizer, training)
    folder = Path(name) if Path(name).is_dir() else Path(name).parent
    return _Source(model, name, lambda: saved_tokenizer(folder), training)


def _weights(model: GPT) -> huggingface.Weights:
    return huggingface.Weights(model.config, model.gelu_approximate, model.state_dict())


def _write_hf(source: _Source, folder: Path) -> list[str]:
    folder.mkdir()
    notes = []
    if not source.model.config.bias:
        notes.append("the model has no biases; zeros were added, because transformers needs them")
    end_of_text = None
    try:
        end_of_text = _write_tokenizer(source, folder)
    except (ValueError, ImportError, ConnectionError) as error:
        notes.append(f"no tokenizer: {error}")
    huggingface.write(_weights(source.model), folder, end_of_text)
    return notes


def _write_safetensors(source: _Source, path: Path) -> list[str]:
    huggingface.write_safetensors(_weights(source.model), path)
    return _write_tokenizer_beside(source, path.parent)


def _write_tokenizer_beside(source: _Source, folder: Path) -> list[str]:
    """Write the tokenizer where ``fastgpt sample`` looks for it, unless there already is one."""
    try:
        tokenizer, present = source.find_tokenizer(), tokenizer_in(folder)
    except (ValueError, ImportError, ConnectionError) as error:
        return [f"no tokenizer: {error}"]
    if tokenizer is None:
        return [f"no tokenizer: there is none beside {source.name}"]
    if present is None:
        with atomic_write(folder / tokenizer.FILE) as file:
            file.write(tokenizer.file_bytes)
    elif present.fingerprint != tokenizer.fingerprint:
        return [f"no tokenizer: {folder} has another, {present.FILE}"]
    return []


def _write_nanogpt(source: _Source, folder: Path) -> list[str]:
    folder.mkdir()
    model = source.model
    state = {"model": model.state_dict(), "model_args": asdict(model.config), **source.training}
    ckpt.save(state, folder / ckpt.BEST)
    if model.gelu_approximate == "none":
        return []
    return [
        "these weights were trained with the tanh form of GELU, but nanoGPT uses the exact one: "
        "its logits differ slightly"
    ]


def _write_tokenizer(source: _Source, folder: Path) -> int | None:
    """Write the files that AutoTokenizer reads. Returns the end-of-text id, if there is one.

    Raises ValueError if there is no tokenizer, or transformers cannot read it.
    """
    tokenizer = source.find_tokenizer()
    if tokenizer is None:
        raise ValueError(f"there is none beside {source.name}")
    path = folder / JsonTokenizer.FILE
    facts: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.model.config.block_size,
        "clean_up_tokenization_spaces": False,
    }
    end: int | None = None
    base = tokenizer.base if isinstance(tokenizer, ChatTokenizer) else tokenizer
    if isinstance(base, CharTokenizer):
        path.write_text(_of_characters(base).to_str(pretty=True), encoding="utf-8")
    elif isinstance(base, GPT2Tokenizer):
        end = base.end_of_text
        path.write_text(_of_byte_pairs(base).to_str(pretty=True), encoding="utf-8")
    elif isinstance(base, JsonTokenizer):
        end = base.end_of_text
        base.save(path)
    else:
        raise ValueError(f"transformers cannot read {tokenizer.name}")
    if isinstance(tokenizer, ChatTokenizer):
        end = tokenizer.end
        _add_special_tokens(path, tokenizer.begin)
        facts["chat_template"] = CHAT_TEMPLATE
    if end is not None:
        facts["bos_token"] = facts["eos_token"] = tokenizer.decode([end])
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")
    return end


def _add_special_tokens(path: Path, first: int) -> None:
    """Add the tokens of dialogues to a ``tokenizer.json``, with ids from ``first`` on.

    Removes the file and raises ValueError if they would get other ids, because it already has a
    token of that name, or ids without a token.
    """
    tokenizers = optional("tokenizers", "the exported tokenizer", "hf")
    json_form = tokenizers.Tokenizer.from_file(str(path))
    added = [tokenizers.AddedToken(name, normalized=False) for name in SPECIAL_TOKENS]
    json_form.add_special_tokens(added)
    for number, name in enumerate(SPECIAL_TOKENS, start=first):
        found = json_form.token_to_id(name)
        if found != number:
            path.unlink()
            raise ValueError(f"{name} has the id {found} in it, but {number} in the model")
    path.write_text(json_form.to_str(pretty=True), encoding="utf-8")


def _of_characters(tokenizer: CharTokenizer) -> Any:
    """A character-level tokenizer of the tokenizers library."""
    tokenizers = optional("tokenizers", "the exported tokenizer", "hf")
    json_form = tokenizers.Tokenizer(tokenizers.models.WordLevel(tokenizer.stoi))
    every = tokenizers.Regex(r"[\s\S]")
    json_form.pre_tokenizer = tokenizers.pre_tokenizers.Split(every, "isolated")
    json_form.decoder = tokenizers.decoders.Fuse()
    return json_form


def _of_byte_pairs(tokenizer: GPT2Tokenizer) -> Any:
    """A BPE tokenizer of the tokenizers library. Every split of a token into two is a merge."""
    tokenizers = optional("tokenizers", "the exported tokenizer", "hf")
    lines = [line.split() for line in tokenizer.file_bytes.splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    char_of = {byte: char for char, byte in byte_of_character().items()}
    names = {token: "".join(char_of[byte] for byte in token) for token in ranks}
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    json_form = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
    )
    json_form.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    json_form.decoder = tokenizers.decoders.ByteLevel()
    json_form.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, normalized=False)])
    return json_form
