"""Generate text from a checkpoint or from pretrained weights."""

import re
from collections import abc
from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from fastgpt.devices import autocast, resolve_device, resolve_dtype
from fastgpt.generation import Generator, Sampling
from fastgpt.language_model import LanguageModel
from fastgpt.model import GPT, published_name
from fastgpt.tokenizer import (
    TOKENIZER_FILES,
    CharTokenizer,
    ChatTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    tokenizer_in,
)
from fastgpt.training import checkpoint as ckpt
from fastgpt.training import checkpoint_folder
from fastgpt.training.config import SampleConfig

_DEFAULT_START = "\n"
_FROM_FILE = "FILE:"
_LINE_END = re.compile(r"\r?\n")


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt."""

    prompt: str
    text: str  # without the prompt
    tokens: int  # number of tokens drawn, including those of a stop text
    finish: str  # "length": max_new_tokens were drawn; "stop": ended at a stop text or token


class Sampler:
    """Samples from a trained model: ``for text in Sampler(SampleConfig()): ...``

    Raises FileNotFoundError if there is no checkpoint, weights or prompt file; ValueError if one
    cannot be read, for weights without a known tokenizer, a device that this machine lacks, or a
    prompt that is empty or has unknown characters; and the errors of ``GPT.from_pretrained``.

    ``note`` names the checkpoint that was read if it is not ``ckpt.pt``, else it is None.
    """

    def __init__(self, config: SampleConfig) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, self.device)
        model, self.tokenizer, self.note = _load(config)
        round_matrices(model, dtype)
        self.model = model.to(self.device).eval()
        if config.compile:
            self.model.compile()
        sampling = Sampling(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
        )
        self._generator = Generator(self.model, sampling, autocast(self.device, dtype))
        in_turns = config.interactive or config.chat or bool(config.dialogues)
        self.prompts = [] if in_turns else read_prompts(config.start, config.lines)
        if self.prompts == [_DEFAULT_START] and not _has_line_feed(self.tokenizer):
            self.prompts = [self.tokenizer.decode(start_ids(self.tokenizer))]
        for prompt in self.prompts:  # raise errors before the first sample
            self._encode(prompt)

    def __iter__(self) -> Iterator[str]:
        """Yield ``num_samples`` texts per prompt, each the prompt followed by its continuation."""
        for batch in self.batches():
            for completion in self.complete(batch):
                yield completion.prompt + completion.text

    def batches(self) -> Iterator[list[str]]:
        """Reset the seed; yield every prompt ``num_samples`` times, ``batch_size`` at a time."""
        torch.manual_seed(self.config.seed)
        count = self.config.num_samples
        prompts = (prompt for prompt in self.prompts for _ in range(count))
        while batch := list(islice(prompts, self.config.batch_size)):
            yield batch

    def complete(self, prompts: Sequence[str]) -> list[Completion]:
        """Continue the prompts as one batch.

        Raises ValueError like the constructor, FloatingPointError if the model's logits are not
        finite.
        """
        rows = [self._row(prompt) for prompt in prompts]
        return self._completed(rows, self.config.max_new_tokens)

    def answers(
        self, prompts: Sequence[tuple[list[int], int]], ends: Container[int]
    ) -> list[Completion]:
        """Continue (ids, maximum number of new tokens) pairs as one batch, each up to a token in
        ``ends``. The completions have an empty prompt.
        """
        rows = [
            _Row(self.tokenizer, ids, "", self.config.stop, ends, room) for ids, room in prompts
        ]
        return self._completed(rows, max(room for _, room in prompts))

    def stream(self, prompt: str) -> Iterator[str]:
        """Continue one prompt. Yields each piece of text as soon as later tokens cannot change it.

        Raises like ``complete``; errors in the prompt are raised immediately.
        """
        return self._pieces(self._row(prompt), self.config.max_new_tokens)

    def stream_answer(
        self, prompt: list[int], ends: Container[int], max_new_tokens: int
    ) -> abc.Generator[str, None, Completion]:
        """The same for one prompt of ``answers``; returns the completion."""
        row = _Row(self.tokenizer, prompt, "", self.config.stop, ends)
        yield from self._pieces(row, max_new_tokens)
        return row.completion()

    def _pieces(self, row: "_Row", max_new_tokens: int) -> Iterator[str]:
        shown = 0
        for _ in self._grow([row], max_new_tokens):
            text = row.final_text()
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
        rest = row.completion().text[shown:]
        if rest:
            yield rest

    def _encode(self, prompt: str) -> list[int]:
        if prompt == _DEFAULT_START:
            return start_ids(self.tokenizer)
        ids = self.tokenizer.encode(prompt)
        if not ids:
            raise ValueError(f"a prompt must hold at least one token, got {prompt!r}")
        return ids

    def _row(self, prompt: str) -> "_Row":
        return _Row(self.tokenizer, self._encode(prompt), prompt, self.config.stop)

    def _completed(self, rows: Sequence["_Row"], max_new_tokens: int) -> list[Completion]:
        for _ in self._grow(rows, max_new_tokens):
            pass
        return [row.completion() for row in rows]

    def _grow(self, rows: Sequence["_Row"], max_new_tokens: int) -> Iterator[None]:
        """Add one token to each row per iteration, until all rows are finished."""
        prompts = [torch.tensor(row.prompt_ids, device=self.device) for row in rows]
        for tokens in self._generator.on_host(prompts, max_new_tokens):
            for row, token in zip(rows, tokens, strict=True):
                row.add(token)
            yield
            if all(row.stopped for row in rows):
                return


class _Row:
    """One text to which tokens are added. Each new token is decoded together with the few before
    it, not with the whole text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        prompt: str,
        stop: Sequence[str],
        ends: Container[int] = (),
        room: int | None = None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self._room = room  # maximum number of new tokens, if lower than the batch's
        self.stopped = False
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._stop = stop
        self._ends = ends
        # Some decoders drop the space before the first word, so new ids are decoded after these
        # ids, whose text is known.
        self._context = prompt_ids
        self._context_text = tokenizer.decode(prompt_ids)
        self._new: list[int] = []  # ids that are not part of _text yet
        self._tokens = 0
        self._text = ""

    def add(self, token: int) -> None:
        if self.stopped or self._tokens == self._room:
            return
        self._tokens += 1
        if token in self._ends:
            self._add_incomplete()
            self.stopped = True
            return
        # A vocabulary padded for speed (50304 for GPT-2) has ids without a text.
        if token >= self._tokenizer.vocab_size:
            return
        self._new.append(token)
        text = self._tokenizer.decode(self._context + self._new)
        if text.endswith("\ufffd"):  # the character may still be incomplete
            return
        self._append(text[len(self._context_text) :])
        # The new ids alone may decode to an empty text (a space, say) and are then no context.
        alone = self._tokenizer.decode(self._new)
        if alone:
            self._context, self._context_text = self._new, alone
        else:
            self._context, self._context_text = self._context + self._new, text
        self._new = []

    def _append(self, piece: str) -> None:
        before = len(self._text)
        self._text += piece
        found = (self._text.find(stop, max(before - len(stop) + 1, 0)) for stop in self._stop)
        ends = [position for position in found if position >= 0]
        if ends:
            self._text, self.stopped = self._text[: min(ends)], True

    def final_text(self) -> str:
        """The text without an end that may be the beginning of a stop text."""
        if self.stopped:
            return self._text
        held = 0
        for stop in self._stop:
            lengths = range(min(len(stop) - 1, len(self._text)), held, -1)
            held = next((n for n in lengths if self._text.endswith(stop[:n])), held)
        return self._text[: len(self._text) - held]

    def _add_incomplete(self) -> None:
        """Decode the remaining ids, even if the last character is incomplete."""
        if self._new:
            text = self._tokenizer.decode(self._context + self._new)
            self._append(text[len(self._context_text) :])
            self._new = []

    def completion(self) -> Completion:
        if not self.stopped:
            self._add_incomplete()
        finish = "stop" if self.stopped else "length"
        return Completion(self._prompt, self._text, self._tokens, finish)


def round_matrices(model: LanguageModel, dtype: torch.dtype) -> None:
    """Cast the matrices that autocast would cast in each product to its ``dtype``, in advance: the
    same results, but half the bytes to read per token. Embeddings, which are added in float32,
    keep their dtype; a head that is tied to one gets its own copy.
    """
    if dtype == torch.float32:
        return
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for param in model.low_precision_parameters():
        if id(param) not in tables:
            param.data = param.data.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in tables:
            module.weight = nn.Parameter(module.weight.detach().to(dtype))


def start_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that a text starts with by default: a line feed, or token 0 if the vocabulary has
    none (that of a single line of text). A dialogue starts with its own token.
    """
    if isinstance(tokenizer, ChatTokenizer):
        return [tokenizer.begin]
    return (tokenizer.encode(_DEFAULT_START) if _has_line_feed(tokenizer) else []) or [0]


def _has_line_feed(tokenizer: Tokenizer) -> bool:
    if isinstance(tokenizer, ChatTokenizer):
        return False
    return not isinstance(tokenizer, CharTokenizer) or _DEFAULT_START in tokenizer.stoi


def write(
    model: LanguageModel,
    tokenizer: Tokenizer,
    start: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    context: AbstractContextManager[object],
) -> str:
    """The text of the ids ``start`` followed by ``max_new_tokens`` drawn tokens. The model runs in
    the autocast ``context``.
    """
    idx = torch.tensor([start], device=next(model.parameters()).device)  # (1, T)
    with context:
        ids: list[int] = model.generate(idx, max_new_tokens, temperature, top_k)[0].tolist()
    # A vocabulary padded for speed (50304 for GPT-2) has ids without a text.
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])


def read_prompts(start: str, lines: bool = False) -> list[str]:
    """The prompt that the key ``start`` gives; with ``lines`` one prompt per line. A file is read
    as by ``fastgpt prepare``: line ends are kept, a byte order mark is removed.

    Raises FileNotFoundError, or ValueError for a file that is empty or not UTF-8.
    """
    text = _read(start)
    if not lines:
        return [text]
    prompts = [line for line in _LINE_END.split(text) if line]
    if not prompts:
        raise ValueError(f"start={start!r} must hold at least one non-empty line with lines")
    return prompts


def _read(start: str) -> str:
    if not start.startswith(_FROM_FILE):
        return start
    path = Path(start.removeprefix(_FROM_FILE))
    if not path.is_file():
        raise FileNotFoundError(f"start={start!r}: there is no file {path}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"start={start!r}: {path} is not UTF-8 text ({error})") from error
    if not text:
        raise ValueError(f"start={start!r}: {path} is empty, but a prompt needs text")
    return text


def _load(config: SampleConfig) -> tuple[LanguageModel, Tokenizer, str | None]:
    if config.init_from == "resume":
        path, note = checkpoint_folder.for_sampling(Path(config.out_dir))
        checkpoint = ckpt.load(path)
        return ckpt.build_model(checkpoint, path), ckpt.tokenizer_of(checkpoint, path), note
    model = GPT.from_pretrained(config.init_from)
    if published_name(config.init_from):
        return model, GPT2Tokenizer(), None
    return model, _tokenizer_beside(Path(config.init_from), model.config.vocab_size), None


def _tokenizer_beside(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in the folder of pretrained weights, or else GPT-2's BPE.

    Raises ValueError if it does not match the vocabulary of the weights.
    """
    tokenizer = tokenizer_in(path if path.is_dir() else path.parent)
    if tokenizer is None:
        if vocab_size < ckpt.GPT2_VOCAB_SIZE:
            raise ValueError(
                f"init_from={str(path)!r} has a vocabulary of {vocab_size} tokens, but its folder "
                f"has no tokenizer: none of {', '.join(TOKENIZER_FILES)}"
            )
        return GPT2Tokenizer()
    if not tokenizer.fits(vocab_size):
        raise ValueError(
            f"init_from={str(path)!r} has a vocabulary of {vocab_size} tokens, but the tokenizer "
            f"beside it ({tokenizer.FILE}) has {tokenizer.vocab_size}"
        )
    return tokenizer
