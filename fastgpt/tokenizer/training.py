"""Train a tokenizer on texts, with the library that will use it.

train_tokenizer(source_of("texts"), "bpe", 8192, "tokenizers/mine")
"""

import io
from collections.abc import Iterator
from pathlib import Path

from fastgpt._files import check_folder, writing
from fastgpt._optional import optional
from fastgpt.data.sources import Source
from fastgpt.tokenizer.base import END_OF_TEXT, Tokenizer
from fastgpt.tokenizer.subword import JsonTokenizer, SentencePieceTokenizer

KINDS = ("bpe", "unigram")

_MIN_VOCAB_SIZE = 257  # the bytes and the end of text
_SENTENCES = 1_000_000  # size of the random sample of the input, for unigram
_SENTENCE = 1000  # maximum number of characters


def train_tokenizer(source: Source, kind: str, vocab_size: int, out_dir: str | Path) -> Tokenizer:
    """Train a tokenizer on the texts of ``source`` and write it to ``out_dir``.

    Both kinds encode any text without loss.

    Args:
        source: the texts.
        kind: ``"bpe"``: byte-level byte-pair encoding with GPT-2's pre-tokenization, as
            ``tokenizer.json``; ``"unigram"``: SentencePiece's unigram model with byte fallback, as
            ``tokenizer.model``.
        vocab_size: the number of tokens, at least 257. If the text is too short for that, bpe
            learns fewer and unigram raises.
        out_dir: the folder.

    Raises:
        ImportError: the library is not installed.
        ValueError: an argument is out of range, or the texts are empty or too short for
            ``vocab_size``.
        NotADirectoryError: ``out_dir`` is a file.
        FileExistsError: ``out_dir`` has a tokenizer of this kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if vocab_size < _MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {_MIN_VOCAB_SIZE}, got {vocab_size}")
    out_dir = Path(out_dir)
    check_folder(out_dir)
    path = out_dir / (JsonTokenizer if kind == "bpe" else SentencePieceTokenizer).FILE
    if path.exists():
        raise FileExistsError(f"{path} exists and is not replaced; choose another out_dir")
    data = _bpe(source, vocab_size) if kind == "bpe" else _unigram(source, vocab_size)
    out_dir.mkdir(parents=True, exist_ok=True)
    with writing(path):
        path.write_bytes(data)
    return JsonTokenizer(path) if kind == "bpe" else SentencePieceTokenizer(path)


def _bpe(source: Source, vocab_size: int) -> bytes:
    tokenizers = optional("tokenizers", 'kind="bpe"', "data")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
    )
    tokenizer.train_from_iterator(_not_empty(source.texts()), trainer)
    return bytes(tokenizer.to_str().encode())


def _unigram(source: Source, vocab_size: int) -> bytes:
    sentencepiece = optional("sentencepiece", 'kind="unigram"', "data")
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(_not_empty(source.texts())),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            byte_fallback=True,
            input_sentence_size=_SENTENCES,
            shuffle_input_sentence=True,
            max_sentence_length=4 * _SENTENCE,  # bytes
            minloglevel=1,  # warnings
            # lossless
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece could not learn {vocab_size} tokens from this text: {error}"
        ) from error
    return model.getvalue()


def _not_empty(texts: Iterator[str]) -> Iterator[str]:
    first = next(texts, None)
    if first is None:
        raise ValueError("the input is empty: it has no text")
    yield first
    yield from texts


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    """Lines, cut into parts of at most ``_SENTENCE``, because SentencePiece skips longer ones."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _SENTENCE):
                yield line[start : start + _SENTENCE]
