"""From a checkpoint to text."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from fastgpt import checkpoint as ckpt
from fastgpt.config import SampleConfig
from fastgpt.devices import autocast, resolve_device, resolve_dtype
from fastgpt.language_model import LanguageModel
from fastgpt.model import GPT
from fastgpt.tokenizer import GPT2Tokenizer, Tokenizer

_FROM_FILE = "FILE:"


class Sampler:
    """A trained model that writes text: ``for text in Sampler(SampleConfig()): ...``

    Raises FileNotFoundError without a checkpoint (or prompt file) and ValueError for a checkpoint
    that cannot be read, a device that is not there, an empty prompt or one with characters that
    the model does not know.
    """

    def __init__(self, config: SampleConfig) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self._autocast = autocast(self.device, resolve_dtype(config.dtype, self.device))
        model, self.tokenizer = _load(config)
        self.model = model.to(self.device).eval()
        if config.compile:
            self.model.compile()
        self.start = self.tokenizer.encode(_prompt(config.start))

    def __iter__(self) -> Iterator[str]:
        """``num_samples`` texts, each the prompt and ``max_new_tokens`` more tokens."""
        config = self.config
        torch.manual_seed(config.seed)
        for _ in range(config.num_samples):
            yield write(
                self.model,
                self.tokenizer,
                self.start,
                config.max_new_tokens,
                config.temperature,
                config.top_k,
                self._autocast,
            )


def write(
    model: LanguageModel,
    tokenizer: Tokenizer,
    start: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    context: AbstractContextManager[object],
) -> str:
    """The text of ``start`` and ``max_new_tokens`` tokens that ``model`` adds to it.

    ``context`` is the autocast in which the model runs.
    """
    idx = torch.tensor([start], device=next(model.parameters()).device)  # (1, T)
    with context:
        ids: list[int] = model.generate(idx, max_new_tokens, temperature, top_k)[0].tolist()
    # A vocabulary padded for speed (50304 for GPT-2) has ids that stand for no text.
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])


def _prompt(start: str) -> str:
    if not start.startswith(_FROM_FILE):
        return start
    path = Path(start.removeprefix(_FROM_FILE))
    if not path.is_file():
        raise FileNotFoundError(f"start={start!r}: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"start={start!r}: {path} is not UTF-8 text ({error})") from error
    if not text:
        raise ValueError(f"start={start!r}: {path} is empty, but a prompt needs a character")
    return text


def _load(config: SampleConfig) -> tuple[LanguageModel, Tokenizer]:
    if config.init_from != "resume":
        return GPT.from_pretrained(config.init_from), GPT2Tokenizer()
    path = Path(config.out_dir) / ckpt.BEST
    checkpoint = ckpt.load(path)
    model = ckpt.build_model(checkpoint, path)
    return model, ckpt.tokenizer_of(checkpoint, path)
