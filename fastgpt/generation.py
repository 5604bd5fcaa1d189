"""Sampling: drawing a token from logits, and the autoregressive loop around it.

While a sequence fits into the model's window, a static KV cache is used: one forward pass over the
prompt fills it, then each step computes one token per sequence. Positions are absolute, so a
sequence that has outgrown the window cannot use its cache: each further token takes a forward pass
over the last ``block_size`` tokens, at positions from 0, as in nanoGPT. The sequences of a batch
may have different lengths and leave the window at different times.

On a GPU there is no host synchronization, and a cached step, including the draw, is one CUDA graph.

In shape comments B is the batch size, V ``vocab_size``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastgpt.cuda_graph import Graphed

_LEAST_TEMPERATURE = 1e-30  # float32 logits divided by less overflow
NOT_FINITE = -1  # returned instead of a token if the logits are NaN or infinite


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Applied in this order: penalty, temperature, ``top_k``, ``top_p``,
    ``min_p``.

    Args:
        temperature: divisor of the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens, and any that tie with the last; None keeps all.
        top_p: keep the fewest tokens that together have this probability (nucleus sampling,
            Holtzman et al. 2020), at least the likeliest; 1 keeps all.
        min_p: drop tokens less likely than this fraction of the likeliest (Nguyen et al. 2024);
            0 drops none.
        repetition_penalty: divides positive logits of tokens that are already in the sequence, and
            multiplies negative ones (CTRL, Keskar et al. 2019); 1 changes none.

    Raises ValueError naming the argument, its value and what is allowed.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0.0 and not _LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 (greedy), or at least {_LEAST_TEMPERATURE} and finite, "
                f"got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all tokens, got {self.top_k}")
        if self.top_k is not None and not hasattr(self.top_k, "__index__"):
            raise TypeError(f"top_k must be an integer, or None for all tokens, got {self.top_k}")
        for name in ("top_p", "min_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty must be positive and finite, got {self.repetition_penalty}"
            )


def draw(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Draw one token per row: logits (B, V) → tokens (B,), ``NOT_FINITE`` for rows that are not
    finite.

    ``seen`` (B, V), bool: the tokens that the penalty applies to. The draws equal those of
    ``torch.multinomial``, without its host synchronization on a GPU.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if seen is not None:
        penalty = sampling.repetition_penalty
        penalised = torch.where(scores > 0.0, scores / penalty, scores * penalty)
        scores = penalised.where(seen, scores)
    if sampling.temperature == 0.0:
        best, tokens = scores.max(dim=-1)
        return tokens.masked_fill(~best.isfinite(), NOT_FINITE)
    scores = scores / sampling.temperature
    if sampling.top_k is not None:
        kth_best = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < kth_best, -math.inf)
    probs = torch.softmax(scores, dim=-1)
    valid = probs[:, 0].isfinite()  # one NaN or infinite logit makes the whole row NaN
    if sampling.top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        dropped = before >= sampling.top_p
        dropped[:, 0] = False
        probs = probs.masked_fill(dropped.scatter(1, order, dropped), 0.0)
    if sampling.min_p > 0.0:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0.0)
    # The exponential race: the argmin of exponential variables whose rates are the probabilities,
    # which need not sum to 1.
    tokens = (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1)
    return tokens.masked_fill(~valid, NOT_FINITE)


def check_finite(tokens: Sequence[int]) -> None:
    """Raise FloatingPointError if a token is ``NOT_FINITE``."""
    if NOT_FINITE in tokens:
        raise FloatingPointError(
            "the model's logits are NaN or infinite: its weights are damaged, or they overflow "
            "the dtype"
        )


class _Shape(Protocol):
    block_size: int
    vocab_size: int


class Predictor(Protocol):
    """The interface of a language model that ``Generator`` uses."""

    @property
    def config(self) -> _Shape: ...

    def __call__(self, idx: Tensor) -> tuple[Tensor, None]:
        """Token ids (B, T) → logits (B, 1, V) of the next token."""

    def _logits(self, idx: Tensor, last_only: bool) -> Tensor:
        """Token ids (B, T) → logits (B, T, V)."""

    def _caches(self) -> bool:
        """Whether ``_prefill`` and ``_decode`` give the same results as a full forward pass."""

    def _prefill(self, idx: Tensor, last: Tensor, n_slots: int, cache: list[Tensor]) -> Tensor:
        """Token ids (B, T), where row b ends at ``last[b]`` → logits (B, V) at that position.

        Writes to ``cache``, one tensor per layer for ``n_slots`` tokens. If the list is empty, the
        tensors are appended to it.
        """

    def _decode(self, tokens: Tensor, positions: Tensor, cache: list[Tensor]) -> Tensor:
        """Tokens (B,) at their positions (B,) → logits (B, V) of the next ones."""


class Generator:
    """Generates tokens with a model. Reuses the cache and the CUDA graph for batches of the same
    size.

        generator = Generator(model, Sampling(temperature=0.8))
        for tokens in generator([prompt, other_prompt], max_new_tokens=100): ...

    The model's weights must stay at the same addresses between calls. ``autocast`` is the context
    in which the model runs, or None. It is not active while the caller has control.
    """

    def __init__(
        self,
        model: Predictor,
        sampling: Sampling,
        autocast: AbstractContextManager[object] | None = None,
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._autocast = nullcontext() if autocast is None else autocast
        self._batch: _Batch | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Tensor], max_new_tokens: int) -> Iterator[Tensor]:
        """Yield the next token of each prompt, ``max_new_tokens`` times: (B,), int64, on the
        model's device; ``NOT_FINITE`` if the logits are not finite.

        ``prompts``: one or more tensors of token ids (T,), T >= 1, on that device; not checked.
        """
        lengths = [len(prompt) for prompt in prompts]
        block_size = self._model.config.block_size
        cached = max_new_tokens > 1 and min(lengths) < block_size and self._model._caches()
        batch = self._begin(prompts, max(lengths) + max_new_tokens)
        for step in range(max_new_tokens):
            with self._autocast:
                if not cached:
                    batch.append(batch.window_logits(lengths))
                elif step == 0:
                    batch.append(batch.prefill_logits(lengths))
                elif max(lengths) <= block_size:
                    batch.step()
                else:
                    batch.append(batch.mixed_logits(lengths))
            yield batch.last_tokens()
            lengths = [length + 1 for length in lengths]

    def on_host(self, prompts: Sequence[Tensor], max_new_tokens: int) -> Iterator[list[int]]:
        """The same as lists. Raises FloatingPointError if the logits are not finite."""
        for step in self(prompts, max_new_tokens):
            tokens: list[int] = step.tolist()
            check_finite(tokens)
            yield tokens

    def _begin(self, prompts: Sequence[Tensor], capacity: int) -> "_Batch":
        sizes = (len(prompts), capacity)
        if self._batch is None or self._batch.sizes != sizes:
            self._batch = _Batch(self._model, self._sampling, *sizes, prompts[0].device)
        self._batch.begin(prompts)
        return self._batch


class _Batch:
    """The sequences of a batch so far, and their KV cache. All tensors are updated in place, as a
    CUDA graph requires.
    """

    def __init__(
        self,
        model: Predictor,
        sampling: Sampling,
        size: int,
        capacity: int,  # final length of the longest sequence
        device: torch.device,
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._window = model.config.block_size
        self.sizes = (size, capacity)
        self._ids = torch.zeros(size, capacity, dtype=torch.int64, device=device)
        self._positions = torch.zeros(size, dtype=torch.int64, device=device)  # of the last token
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            seen = (size, model.config.vocab_size)
            self._seen = torch.zeros(seen, dtype=torch.bool, device=device)
        self._n_slots = min(self._window, capacity - 1)  # the last token is never an input
        self._cache: list[Tensor] = []
        self.step: Callable[[], None] = self._step
        if device.type == "cuda":
            self.step = Graphed(self._step, device)

    def begin(self, prompts: Sequence[Tensor]) -> None:
        for row, prompt in enumerate(prompts):
            self._ids[row, : len(prompt)] = prompt
            self._positions[row] = len(prompt) - 1
        if self._seen is not None:
            self._seen.zero_()
            for row, prompt in enumerate(prompts):
                self._seen[row, prompt.long()] = True

    def last_tokens(self) -> Tensor:
        """The last token (B,) of every sequence, perhaps ``NOT_FINITE``."""
        return self._ids.gather(1, self._positions[:, None])[:, 0]

    def append(self, logits: Tensor) -> None:
        """Draw the next token of every sequence from ``logits`` (B, V)."""
        tokens = draw(logits, self._sampling, self._seen)[:, None]
        self._positions += 1
        self._ids.scatter_(1, self._positions[:, None], tokens)
        if self._seen is not None:
            self._seen.scatter_(1, _valid(tokens), True)

    def _step(self) -> None:
        self.append(self._decode())

    def _decode(self) -> Tensor:
        # A row that has left the window is decoded too; its logits are not used.
        positions = self._positions.clamp(max=self._n_slots - 1)
        return self._model._decode(_valid(self.last_tokens()), positions, self._cache)

    def prefill_logits(self, lengths: Sequence[int]) -> Tensor:
        windows, last = self._windows(range(len(lengths)), lengths)
        return self._model._prefill(windows, last, self._n_slots, self._cache)

    def window_logits(self, lengths: Sequence[int], rows: Sequence[int] | None = None) -> Tensor:
        """Logits (rows, V) from a forward pass over the last ``block_size`` tokens of the rows."""
        rows = range(len(lengths)) if rows is None else rows
        windows, last = self._windows(rows, lengths)
        if len({min(lengths[row], self._window) for row in rows}) == 1:
            return self._model(windows)[0][:, -1]
        logits = self._model._logits(windows, last_only=False)
        return logits[torch.arange(len(rows), device=last.device), last]

    def mixed_logits(self, lengths: Sequence[int]) -> Tensor:
        """Logits from the cache for rows inside the window, from a forward pass for the others."""
        rows = [row for row, length in enumerate(lengths) if length > self._window]
        logits = self.window_logits(lengths, rows)
        if len(rows) == len(lengths):
            return logits
        return self._decode().index_copy(0, torch.tensor(rows, device=logits.device), logits)

    def _windows(self, rows: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The last ``block_size`` tokens of the rows, shorter ones padded with arbitrary ids; and
        the index of each row's last token."""
        widths = [min(lengths[row], self._window) for row in rows]
        starts = [lengths[row] - width for row, width in zip(rows, widths, strict=True)]
        device = self._ids.device
        offsets = torch.arange(max(widths), device=device)
        columns = torch.tensor(starts, device=device)[:, None] + offsets
        ids = self._ids[torch.tensor(list(rows), device=device)]
        last = torch.tensor([width - 1 for width in widths], device=device)
        return _valid(ids.gather(1, columns.clamp(max=self.sizes[1] - 1))), last


def _valid(tokens: Tensor) -> Tensor:
    """Replace ``NOT_FINITE`` by an id that an embedding accepts."""
    return tokens.clamp(min=0)
