"""Greedy and beam search for a ``Seq2Seq`` with a KV cache.

A hypothesis y of n tokens, end included, has the score log P(y | x) / ((5 + n) / 6)^alpha (Wu et
al. 2016, arXiv:1609.08144). A finished hypothesis leaves the beam. The search of a sentence ends
when no other can reach a better score. A beam of 1 is greedy search.

In shape comments B is the batch size, K the beam, V the vocabulary size, T the maximum length.
"""

import torch
from torch import Tensor

from fastgpt.seq2seq import Seq2Seq


@torch.no_grad()
def beam_search(
    model: Seq2Seq,
    source: Tensor,
    beam: int = 4,
    length_penalty: float = 0.6,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """The best translation of each source, as ids without the end token.

    Args:
        model: in eval mode.
        source: (B, S), int64, on the model's device, padded by ``PADDING``.
        beam: number of hypotheses per source.
        length_penalty: alpha; 0 compares sums of log-probabilities, which favours short ones.
        max_tokens: maximum length, at which hypotheses are cut off; by default and at most
            ``block_size``.

    Raises:
        ValueError: an argument is out of range.
        FloatingPointError: logits are not finite.
    """
    n_classes, block_size = model.config.vocab_size, model.config.block_size
    if not 1 <= beam <= n_classes:
        raise ValueError(f"beam must lie in [1, {n_classes}] (the vocabulary), got {beam}")
    if not 0.0 <= length_penalty <= 10.0:
        raise ValueError(f"length_penalty must lie in [0, 10], got {length_penalty}")
    limit = block_size if max_tokens is None else max_tokens
    if not 1 <= limit <= block_size:
        raise ValueError(f"max_tokens must lie in [1, {block_size}] (block_size), got {limit}")

    def penalty(n_tokens: int) -> float:
        return ((5 + n_tokens) / 6) ** length_penalty

    n_sources, device = len(source), source.device
    first_rows = beam * torch.arange(n_sources, device=device)[:, None]
    memory = model.encode(source)
    cache = model.empty_cache(n_sources * beam, limit)
    tokens = torch.full((n_sources * beam,), model.end, device=device)
    beams = torch.full((n_sources, beam, limit), model.end, device=device)  # (B, K, T)
    sums = torch.full((n_sources, beam), -torch.inf, device=device)  # of log-probabilities
    sums[:, 0] = 0.0  # only one, because at first all hypotheses are the same
    best = beams[:, 0].clone()
    best_score = torch.full((n_sources,), -torch.inf, device=device)
    for position in range(limit):
        logits = model.decode(tokens, position, memory, cache)
        steps = torch.log_softmax(logits.float(), dim=-1).view(n_sources, beam, n_classes)
        sums, chosen = (sums[..., None] + steps).flatten(1).topk(beam)
        parents = chosen.div(n_classes, rounding_mode="floor")
        words = chosen % n_classes
        beams = beams.gather(1, parents[..., None].expand_as(beams))
        beams[..., position] = words
        ended = words == model.end
        if position == limit - 1:
            ended = torch.ones_like(ended)
        score, which = (sums / penalty(position + 1)).where(ended, -torch.inf).max(1)
        better = score > best_score
        winners = beams.gather(1, which[:, None, None].expand(-1, 1, limit))[:, 0]
        best = winners.where(better[:, None], best)
        best_score = score.where(better, best_score)
        sums = sums.where(~ended, -torch.inf)
        # The sum of a hypothesis can only decrease, and no penalty is larger than the limit's.
        if not (sums.amax(1) / penalty(limit) > best_score).any():
            break
        tokens = words.flatten()
        if beam > 1:
            rows, filled = (first_rows + parents).flatten(), position + 1
            for of_layer in cache:
                of_layer[:, :, :, :filled] = of_layer[:, rows, :, :filled]
    if not best_score.isfinite().all():
        raise FloatingPointError("the logits of the translation are not finite")
    return [row[: row.index(model.end)] if model.end in row else row for row in best.tolist()]
