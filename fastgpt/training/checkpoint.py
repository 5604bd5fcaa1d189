"""Checkpoints in nanoGPT's format, written atomically.

A checkpoint has nanoGPT's keys (``model``, ``optimizer``, ``model_args``, ``iter_num``,
``best_val_loss``, ``config``) and one of ours, ``fastgpt``, for state that nanoGPT does not store:
the kind of model, its GELU, its tokenizer, the random generators, the position in the data and the
gradient scaler. All of it loads with ``weights_only=True``. ``checkpoint_folder.py`` decides which
checkpoints a run keeps; ``sharded_checkpoint.py`` handles those of sharded runs.
"""

import shlex
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastgpt._files import atomic_write, reading_checkpoint
from fastgpt.bigram import Bigram
from fastgpt.language_model import GPTConfig, LanguageModel
from fastgpt.model import GPT
from fastgpt.tokenizer import (
    GPT2Tokenizer,
    Tokenizer,
    saved_tokenizer,
    unpacked,
)

BEST = "ckpt.pt"  # the name that nanoGPT uses

FOR_SAMPLING = ("model", "model_args")
FOR_RESUMING = (*FOR_SAMPLING, "optimizer", "iter_num", "best_val_loss")

REWARD_HEAD = "reward_head.weight"  # the only weight that a reward model adds to a GPT's

GPT2_VOCAB_SIZE = 50257  # the last token ends a document

Checkpoint = dict[str, Any]


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write ``checkpoint`` to ``path`` atomically: if the process dies, ``path`` is either the old
    checkpoint or the new one.
    """
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def publish(source: Path, path: Path) -> None:
    """Copy the checkpoint ``source``, a file or a sharded run's folder, to the file ``path``."""
    if source.is_dir():
        save(load(source), path)
        return
    with open(source, "rb") as original, atomic_write(path) as file:
        shutil.copyfileobj(original, file, 1 << 24)


def load(path: Path, required: tuple[str, ...] = FOR_SAMPLING) -> Checkpoint:
    """Read a checkpoint of ours or of nanoGPT, or the folder of a sharded run, with all tensors on
    the CPU.

    Raises FileNotFoundError, or ValueError if it is damaged or lacks a ``required`` key.
    """
    if path.is_dir():
        # Imported late: it takes half as long as importing PyTorch itself.
        from fastgpt.training import sharded_checkpoint

        checkpoint = sharded_checkpoint.load(path)
    elif path.is_file():
        with reading_checkpoint(path):
            with zipfile.ZipFile(path) as archive:  # PyTorch does not verify checksums
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    else:
        raise FileNotFoundError(f"there is no checkpoint {path}")
    _check_keys(path, checkpoint, required)
    return checkpoint


def header(path: Path) -> Checkpoint:
    """A checkpoint without reading its tensors: those of a file are memory-mapped, those of a
    folder omitted. Unlike ``load``, does not verify checksums.

    Raises FileNotFoundError, or ValueError if it is damaged or lacks the key ``iter_num``.
    """
    if path.is_dir():
        from fastgpt.training import sharded_checkpoint

        checkpoint = sharded_checkpoint.header(path)
    else:
        with reading_checkpoint(path):
            zipfile.ZipFile(path).close()  # PyTorch would raise OSError for a truncated file
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    _check_keys(path, checkpoint, ("iter_num",))
    return checkpoint


def _check_keys(path: Path, checkpoint: object, required: tuple[str, ...]) -> None:
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} must hold a dict with the keys {', '.join(required)}, "
            f"got {type(checkpoint).__name__}"
        )
    missing = [key for key in required if key not in checkpoint]
    if missing:
        raise ValueError(
            f"{path} lacks the checkpoint key {', '.join(missing)}; needed: {', '.join(required)}"
        )
    for key in (*required, "config", "fastgpt"):
        number = key in ("iter_num", "best_val_loss")
        if not number and not isinstance(checkpoint.get(key, {}), dict):
            raise ValueError(
                f"{path} must hold a dict under the key {key}, got {type(checkpoint[key]).__name__}"
            )


def own_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's entry ``fastgpt``; empty for a checkpoint of nanoGPT's."""
    return checkpoint.get("fastgpt", {})


def own_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer stored in the checkpoint; None for a checkpoint of nanoGPT's, or if the data
    set had none.

    Raises ImportError if a library that it needs is not installed.
    """
    return unpacked(own_state(checkpoint))


def tokenizer_of(checkpoint: Checkpoint, path: Path) -> Tokenizer:
    """The tokenizer of the data that a model was trained on: that in the checkpoint, else that in
    the data set's folder, else GPT-2's BPE, as in nanoGPT.

    Raises ValueError naming ``path`` if it is missing or does not match the model's vocabulary, or
    for a translation model; ImportError or ConnectionError if a library or GPT-2's vocabulary is
    missing.
    """
    refuse_translation(checkpoint, path)
    size = checkpoint["model_args"]["vocab_size"]
    run = checkpoint.get("config", {})
    data_dir = Path(run.get("data_root", "data")) / run.get("dataset", "")
    tokenizer = own_tokenizer(checkpoint) or saved_tokenizer(data_dir)
    if tokenizer is None:
        if size < GPT2_VOCAB_SIZE:
            raise ValueError(
                f"{path} has a vocabulary of {size} tokens, but its data set's folder {data_dir} "
                "has no tokenizer (meta.pkl, for example); run the command in the folder in which "
                "the model was trained"
            )
        tokenizer = GPT2Tokenizer()
    if not tokenizer.fits(size):
        raise ValueError(
            f"{path} has a vocabulary of {size} tokens, but its data set has "
            f"{tokenizer.vocab_size}: has the data been prepared again from another text?"
        )
    return tokenizer


def refuse_translation(checkpoint: Checkpoint, path: Path) -> None:
    """Raise ValueError for what ``fastgpt translate train`` wrote."""
    if "source_tokenizer" in checkpoint:
        raise ValueError(
            f"{path} is a translation model: fastgpt translate --model "
            f"{shlex.quote(str(path.parent))} uses it"
        )


def kind(model: LanguageModel) -> str:
    """The value of the key ``model`` for this kind of model."""
    return "bigram" if isinstance(model, Bigram) else "gpt"


def kind_and_gelu(model: LanguageModel) -> dict[str, str]:
    """Entries under the key ``fastgpt`` that ``build_model`` needs besides ``model_args``."""
    return {"model": kind(model), "gelu": getattr(model, "gelu_approximate", "none")}


def build_model(
    checkpoint: Checkpoint, path: Path, dropout: float | None = None, weights: bool = True
) -> LanguageModel:
    """The checkpoint's model, on the CPU, with new weights unless ``weights``. ``dropout`` replaces
    the saved rate.

    Raises ValueError naming ``path``, from which the checkpoint was loaded.
    """
    refuse_translation(checkpoint, path)
    if REWARD_HEAD in checkpoint["model"]:
        folder = shlex.quote(str(path.parent))
        raise ValueError(f"{path} is a reward model: fastgpt rl --reward {folder} uses it")
    own = own_state(checkpoint)
    try:
        args = dict(checkpoint["model_args"])
        if dropout is not None:
            args["dropout"] = dropout
        config = GPTConfig(**args)
        model: LanguageModel
        if own.get("model", "gpt") == "bigram":
            model = Bigram(config)
        else:
            model = GPT(config, gelu=own.get("gelu", "none"))
        if weights:
            model.load_state_dict(checkpoint["model"])
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # PyTorch's message has a line per tensor
        raise ValueError(f"{path} holds no model that fastgpt can build: {reason}") from error
    return model
