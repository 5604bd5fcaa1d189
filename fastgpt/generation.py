"""From logits to tokens, one after the other: the draw, and the loop that feeds a model with what
it drew.

While a sequence fits into the model's window its keys and values stay in a static cache: the prompt
fills it in one forward pass, then each step computes one token a sequence. Positions are absolute,
so a longer sequence has to begin anew: its last ``block_size`` tokens, at positions from 0, go
through the model whole for every further token, as nanoGPT does it. Sequences of a batch may be of
different lengths, and pass that point at different times.

On a GPU the host waits for nothing here, and a cached step, draw included, is one CUDA graph.

In the shape comments B is the batch, V ``vocab_size``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NOT_FINITE = -1  # in place of a token that NaN or infinite logits gave no probability


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. In this order: the penalty, the temperature, and what ``top_k``,
    ``top_p`` and ``min_p`` leave of the tokens.

    Args:
        temperature: divisor of the logits; 0 takes the likeliest token.
        top_k: keep this many of the likeliest, and whatever ties with the last; None keeps all.
        top_p: keep the fewest that together have this probability (nucleus sampling, Holtzman et
            al. 2020), and the likeliest in any case; 1 keeps all.
        min_p: drop what is less likely than this share of the likeliest (Nguyen et al. 2024);
            0 drops none.
        repetition_penalty: divides the positive logits of tokens that are in the sequence already,
            and multiplies the negative ones (CTRL, Keskar et al. 2019); 1 changes none.

    Raises ValueError naming the argument, its value and what is allowed.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be at least 0 (greedy) and finite, got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all tokens, got {self.top_k}")
        for name in ("top_p", "min_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty must be positive and finite, got {self.repetition_penalty}"
            )


def draw(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """One token (B,) of each row of ``logits`` (B, V); where they are not finite ``NOT_FINITE``.

    ``seen`` (B, V), bool, says which tokens the penalty is for. The draws are those of
    ``torch.multinomial``, which on a GPU would wait for a look at the probabilities.
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
    # The first of exponential clocks whose rates are the probabilities; what is left of them after
    # the cuts need not sum to 1.
    tokens = (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1)
    return tokens.masked_fill(~valid, NOT_FINITE)


def check_finite(tokens: Sequence[int]) -> None:
    """FloatingPointError if a token is ``NOT_FINITE``."""
    if NOT_FINITE in tokens:
        raise FloatingPointError(
            "the model's logits are NaN or infinite: its weights are damaged, or their numbers "
            "pass the range of the dtype"
        )


class _Shape(Protocol):
    block_size: int
    vocab_size: int


class Predictor(Protocol):
    """What ``Generator`` asks of a language model."""

    @property
    def config(self) -> _Shape: ...

    def __call__(self, idx: Tensor) -> tuple[Tensor, None]:
        """Token ids (B, T) → logits (B, 1, V) of the token behind them."""

    def _logits(self, idx: Tensor, last_only: bool) -> Tensor:
        """Token ids (B, T) → logits (B, T, V)."""

    def _caches(self) -> bool:
        """Whether what was computed of a token holds for all that come after it."""

    def _prefill(self, idx: Tensor, last: Tensor, n_slots: int, cache: list[Tensor]) -> Tensor:
        """Token ids (B, T), of which row b ends at ``last[b]`` → logits (B, V) behind that place.

        Fills ``cache``, one tensor a layer for ``n_slots`` tokens; an empty list gets them.
        """

    def _decode(self, tokens: Tensor, positions: Tensor, cache: list[Tensor]) -> Tensor:
        """Tokens (B,) at their positions (B,) → logits (B, V) of those behind them."""


class Generator:
    """Draws from a model. What a GPU captured is kept for the next batch of the same sizes.

        generator = Generator(model, Sampling(temperature=0.8))
        for tokens in generator([prompt, other_prompt], max_new_tokens=100): ...

    The model's weights must stay where they are between two calls.
    """

    def __init__(self, model: Predictor, sampling: Sampling) -> None:
        self._model = model
        self._sampling = sampling
        self._batch: _Batch | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Tensor], max_new_tokens: int) -> Iterator[Tensor]:
        """The next token of each prompt, ``max_new_tokens`` times: (B,), int64, on the model's
        device, ``NOT_FINITE`` where the logits are not finite.

        ``prompts``: one or more of token ids (T,), T at least 1, on that device; not checked.
        """
        lengths = [len(prompt) for prompt in prompts]
        block_size = self._model.config.block_size
        cached = max_new_tokens > 1 and min(lengths) < block_size and self._model._caches()
        batch = self._begin(prompts, max(lengths) + max_new_tokens)
        for step in range(max_new_tokens):
            if not cached:
                batch.append(batch.window_logits(lengths))
            elif step == 0:
                batch.append(batch.prefill_logits(lengths))
            elif max(lengths) <= block_size:
                batch.step()
            else:
                batch.append(batch.mixed_logits(lengths))
            yield batch.drawn.clone()
            lengths = [length + 1 for length in lengths]

    def _begin(self, prompts: Sequence[Tensor], capacity: int) -> "_Batch":
        sizes = (len(prompts), capacity)
        if self._batch is None or self._batch.sizes != sizes:
            self._batch = _Batch(self._model, self._sampling, *sizes, prompts[0].device)
        self._batch.begin(prompts)
        return self._batch


class _Batch:
    """The sequences of a batch so far, and their cache: tensors that are changed in place, so that
    a CUDA graph finds them.
    """

    def __init__(
        self,
        model: Predictor,
        sampling: Sampling,
        size: int,
        capacity: int,  # tokens of the longest sequence in the end
        device: torch.device,
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._window = model.config.block_size
        self.sizes = (size, capacity)
        self._ids = torch.zeros(size, capacity, dtype=torch.int64, device=device)
        self._positions = torch.zeros(size, dtype=torch.int64, device=device)  # of the last token
        self.drawn = torch.zeros(size, dtype=torch.int64, device=device)
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            seen = (size, model.config.vocab_size)
            self._seen = torch.zeros(seen, dtype=torch.bool, device=device)
        self._n_slots = min(self._window, capacity - 1)  # the last token is drawn, but not fed
        self._cache: list[Tensor] = []
        self.step: Callable[[], None] = self._step
        if device.type == "cuda":
            self.step = _Graphed(self._step, device)

    def begin(self, prompts: Sequence[Tensor]) -> None:
        for row, prompt in enumerate(prompts):
            self._ids[row, : len(prompt)] = prompt
            self._positions[row] = len(prompt) - 1
        if self._seen is not None:
            self._seen.zero_()
            for row, prompt in enumerate(prompts):
                self._seen[row, prompt.long()] = True

    def append(self, logits: Tensor) -> None:
        """Draw the next token of every sequence from ``logits`` (B, V)."""
        self.drawn.copy_(draw(logits, self._sampling, self._seen))
        self._positions += 1
        tokens = self.drawn.clamp(min=0)[:, None]  # NOT_FINITE is no row of a table
        self._ids.scatter_(1, self._positions[:, None], tokens)
        if self._seen is not None:
            self._seen.scatter_(1, tokens, True)

    def _step(self) -> None:
        self.append(self._decode())

    def _decode(self) -> Tensor:
        tokens = self._ids.gather(1, self._positions[:, None])[:, 0]
        # A row that has left the window is decoded too, and its logits are not used.
        positions = self._positions.clamp(max=self._n_slots - 1)
        return self._model._decode(tokens, positions, self._cache)

    def prefill_logits(self, lengths: Sequence[int]) -> Tensor:
        windows, last = self._windows(range(len(lengths)), lengths)
        return self._model._prefill(windows, last, self._n_slots, self._cache)

    def window_logits(self, lengths: Sequence[int], rows: Sequence[int] | None = None) -> Tensor:
        """Logits (rows, V) by a forward pass over all that the model sees of these rows."""
        rows = range(len(lengths)) if rows is None else rows
        windows, last = self._windows(rows, lengths)
        if len({min(lengths[row], self._window) for row in rows}) == 1:
            return self._model(windows)[0][:, -1]
        logits = self._model._logits(windows, last_only=False)
        return logits[torch.arange(len(rows), device=last.device), last]

    def mixed_logits(self, lengths: Sequence[int]) -> Tensor:
        """By a cached step for the rows that are in the window still, anew for the others."""
        rows = [row for row, length in enumerate(lengths) if length > self._window]
        logits = self.window_logits(lengths, rows)
        if len(rows) == len(lengths):
            return logits
        return self._decode().index_copy(0, torch.tensor(rows, device=logits.device), logits)

    def _windows(self, rows: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The last tokens of these rows, as many as the model sees, shorter ones followed by
        anything; and where each ends."""
        widths = [min(lengths[row], self._window) for row in rows]
        starts = [lengths[row] - width for row, width in zip(rows, widths, strict=True)]
        device = self._ids.device
        offsets = torch.arange(max(widths), device=device)
        columns = torch.tensor(starts, device=device)[:, None] + offsets
        ids = self._ids[torch.tensor(list(rows), device=device)]
        last = torch.tensor([width - 1 for width in widths], device=device)
        return ids.gather(1, columns.clamp(max=self.sizes[1] - 1)), last


class _Graphed:
    """A step that works in place, as a CUDA graph from its third call on: by then kernels are
    compiled and loaded, and libraries have allocated what they keep.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self) -> None:
        self._calls += 1
        if self._calls < 3:
            self._step()
            return
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Autocast would keep cast weights for others that are only computed when this replays.
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with (
            torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False),
            torch.cuda.device(self._device),
            torch.cuda.graph(graph),
        ):
            self._step()
        return graph
