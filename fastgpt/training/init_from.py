"""The starting point of a run: new weights, pretrained weights, or its own checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgpt.bigram import Bigram
from fastgpt.data.manifest import read_manifest
from fastgpt.interop import huggingface
from fastgpt.language_model import GPTConfig, LanguageModel
from fastgpt.model import GPT, published_name
from fastgpt.tokenizer import CharTokenizer, ChatTokenizer, Tokenizer, tokenizer_in
from fastgpt.training import checkpoint as ckpt
from fastgpt.training import checkpoint_folder
from fastgpt.training.config import TrainConfig
from fastgpt.training.distributed import World

PADDED_GPT2_VOCAB_SIZE = -(-ckpt.GPT2_VOCAB_SIZE // 64) * 64  # for data without a tokenizer
SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "bias")


def new_model(
    config: TrainConfig,
    tokenizer: Tokenizer | None,
    build: Callable[[GPTConfig], LanguageModel] | None = None,
) -> LanguageModel:
    """A model with new weights, constructed by ``build`` if given, or the pretrained model that
    ``init_from`` names.

    Raises ValueError if the pretrained model does not match the data or the config, and the errors
    of ``GPT.from_pretrained``.
    """
    if config.init_from != "scratch":
        return _pretrained(config, tokenizer)
    shape = GPTConfig(
        vocab_size=tokenizer.padded_vocab_size if tokenizer else PADDED_GPT2_VOCAB_SIZE,
        dropout=config.dropout,
        **{key: getattr(config, key) for key in SHAPE_KEYS},
    )
    if build is not None:
        return build(shape)
    return Bigram(shape) if config.model == "bigram" else GPT(shape)


def _pretrained(config: TrainConfig, tokenizer: Tokenizer | None) -> GPT:
    source = f"init_from={config.init_from!r}"
    published = published_name(config.init_from)
    base = tokenizer.base if isinstance(tokenizer, ChatTokenizer) else tokenizer
    if published and base and base.padded_vocab_size != PADDED_GPT2_VOCAB_SIZE:
        raise ValueError(
            f"{source} needs a data set of GPT-2's tokens, but {config.data_dir} has others "
            f"({base.name})"
        )
    model, theirs = _loaded(config)
    grows = isinstance(tokenizer, ChatTokenizer) and not isinstance(theirs, ChatTokenizer)
    if not published:
        _check_tokens(config, base if grows else tokenizer, theirs, model.config.vocab_size)
    if isinstance(tokenizer, ChatTokenizer) and grows:
        _add_tokens(model, tokenizer)
    if config.block_size > model.config.block_size:
        raise ValueError(
            f"block_size must be at most {model.config.block_size} with {source}, "
            f"got {config.block_size}"
        )
    model.crop_block_size(config.block_size)
    return model


def _loaded(config: TrainConfig) -> tuple[GPT, Tokenizer | None]:
    """The model that ``init_from`` names, on the CPU, and its tokenizer, if known."""
    path = Path(config.init_from)
    if published_name(config.init_from):
        return GPT.from_pretrained(config.init_from, {"dropout": config.dropout}), None
    of_a_run = path.is_dir() and not (path / huggingface.CONFIG_FILE).exists()
    if of_a_run and ((path / ckpt.BEST).exists() or checkpoint_folder.saved(path)):
        file, _ = checkpoint_folder.for_sampling(path)
        saved = ckpt.load(file)
        model = ckpt.build_model(saved, file, dropout=config.dropout)
        if not isinstance(model, GPT):
            raise ValueError(
                f"init_from={config.init_from!r} must hold a gpt, got {ckpt.kind(model)} in {file}"
            )
        return model, ckpt.own_tokenizer(saved)
    model = GPT.from_pretrained(config.init_from, {"dropout": config.dropout})
    return model, tokenizer_in(path if path.is_dir() else path.parent)


def _add_tokens(model: GPT, tokenizer: ChatTokenizer) -> None:
    """Add rows to the token embedding for the special tokens of ``tokenizer`` and for padding. They
    start at the mean of the others, because a trained model would find a row of zeros likelier than
    most tokens; a little noise makes them different.
    """
    wte, known = model.transformer.wte, tokenizer.base.vocab_size
    old = model.lm_head.weight.detach()
    n_rows = max(len(old), tokenizer.padded_vocab_size)
    table = torch.empty(n_rows, old.shape[1]).normal_(0.0, 0.02)
    table += old[:known].mean(dim=0)
    table[:known] = old[:known]
    wte.weight = model.lm_head.weight = nn.Parameter(table)
    wte.num_embeddings = model.lm_head.out_features = model.config.vocab_size = n_rows


def _check_tokens(
    config: TrainConfig, tokenizer: Tokenizer | None, theirs: Tokenizer | None, rows: int
) -> None:
    """Raise ValueError unless a model whose token embedding has ``rows`` rows and whose tokenizer
    is ``theirs`` was trained on the data set's tokens."""
    ids = tokenizer.vocab_size if tokenizer else ckpt.GPT2_VOCAB_SIZE
    if not (tokenizer.fits(rows) if tokenizer else ids <= rows):
        raise ValueError(
            f"init_from={config.init_from!r} has a vocabulary of {rows} tokens, but the data set "
            f"{config.data_dir} has {ids}"
        )
    if tokenizer is None or theirs is None or theirs.fingerprint == tokenizer.fingerprint:
        return
    # Tokenizer files of different kinds may have the same vocabulary.
    for token in range(ids):
        if token >= theirs.vocab_size or theirs.decode([token]) != tokenizer.decode([token]):
            raise ValueError(
                f"init_from={config.init_from!r} was trained on other tokens than those of the "
                f"data set {config.data_dir}: they differ from id {token} on"
            )


def saved_state(
    config: TrainConfig, tokenizer: Tokenizer | None, fingerprint: str, world: World
) -> tuple[ckpt.Checkpoint, Path]:
    """The newest checkpoint in ``out_dir`` and its path. In a sharded run, without the tensors of a
    folder, which ``sharded_checkpoint.load_into`` reads. ``fingerprint`` is the data set's.

    Raises FileNotFoundError if there is none, ValueError if it is damaged, or was trained on other
    tokens, or on other data under the data set's name.
    """

    def read(path: Path) -> ckpt.Checkpoint:
        if path.is_dir() and is_sharded(config, world):
            from fastgpt.training import sharded_checkpoint

            sharded_checkpoint.check(path, world)
            return sharded_checkpoint.header(path)
        return ckpt.load(path, ckpt.FOR_RESUMING)

    saved, path = checkpoint_folder.read_newest(Path(config.out_dir), read)
    known = ckpt.own_tokenizer(saved)
    if known and (tokenizer is None or tokenizer.fingerprint != known.fingerprint):
        tokens = "characters" if isinstance(known, CharTokenizer) else "tokens"
        raise ValueError(
            f"{path} was trained on {known.vocab_size} {tokens} that are not those of the "
            f"data set {config.data_dir}: resume with the data it was trained on"
        )
    same_name = saved.get("config", {}).get("dataset") == config.dataset
    if same_name and is_of_other_data(saved, fingerprint):
        raise ValueError(
            f"{path} was trained on other data than {config.data_dir} has now: resume with the "
            "data it was trained on, or, to continue with the new data, rename its folder and "
            "pass the new name as --dataset"
        )
    return saved, path


def is_of_other_data(saved: ckpt.Checkpoint, fingerprint: str) -> bool:
    """Whether a checkpoint has the fingerprint of its data set, and it differs."""
    return ckpt.own_state(saved).get("data_fingerprint", fingerprint) != fingerprint


def is_sharded(config: TrainConfig, world: World) -> bool:
    """Whether each process has a shard of the model; never with a single process."""
    return config.parallel == "fsdp" and world.size > 1


def shape_of(model: LanguageModel) -> dict[str, Any]:
    """The keys of the config that a loaded model determines."""
    shape: dict[str, Any] = {key: getattr(model.config, key) for key in SHAPE_KEYS}
    return {**shape, "model": ckpt.kind(model)}


def eot_token(config: TrainConfig, tokenizer: Tokenizer | None) -> int | None:
    """The token between two documents of the data set, for ``document_mask``; None without it.

    Raises ValueError if there is none, or one that occurs within documents too.
    """
    if not config.document_mask:
        return None
    manifest = read_manifest(config.data_dir)
    if manifest is not None:
        token, why = manifest.settings.get("end_of_text"), "is one text"
    elif tokenizer is None:  # nanoGPT's
        return ckpt.GPT2_VOCAB_SIZE - 1
    else:
        token, why = tokenizer.end_of_text, f"has no end of text in {tokenizer.name}"
    if isinstance(tokenizer, CharTokenizer):
        token, why = None, "consists of characters"
    if token is None:
        raise ValueError(
            f"document_mask must be False with the data set {config.data_dir}: it {why}, so it has "
            "no token that only occurs between documents"
        )
    return int(token)
