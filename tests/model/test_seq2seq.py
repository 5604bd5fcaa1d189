"""The encoder-decoder against ``torch.nn.Transformer``; padding, KV cache, beam search."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastgpt.ops
from bench.attention_map import cross_attention
from bench.translation import TorchTransformer, our_names
from fastgpt.kernels import fused
from fastgpt.seq2seq import PADDING, Seq2Seq, Seq2SeqConfig
from fastgpt.training.optimizer import MasterAdamW
from fastgpt.training.step import Step
from fastgpt.translation.search import beam_search

C, H, V, SOURCE_V = 16, 2, 11, 7
LENGTHS = ((5, 3, 1), (2, 4, 4))  # sources and targets of a batch


def small(ops=fastgpt.ops, device="cpu", **changes) -> Seq2Seq:
    """A small model whose gains and biases differ from their initial values."""
    sizes = dict(block_size=8, vocab_size=V, n_layer=2, n_head=H, n_embd=C)
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig(**{**sizes, "source_vocab_size": SOURCE_V, **changes}), ops)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    return model.to(device)


def rows(lengths: tuple[int, ...], vocab_size: int, width: int | None = None) -> Tensor:
    """Random ids padded to ``width``; the ids do not depend on it."""
    found = torch.full((len(lengths), width or max(lengths)), PADDING)
    for row, length in zip(found, lengths, strict=True):
        draw = torch.Generator().manual_seed(length)
        row[:length] = torch.randint(vocab_size, (length,), generator=draw)
    return found


def batch(device: str = "cpu") -> tuple[Tensor, Tensor]:
    return rows(LENGTHS[0], SOURCE_V).to(device), rows(LENGTHS[1], V).to(device)


def test_parity_with_pytorch(ops, device):
    """Logits, label-smoothed loss and all gradients, with the same weights."""
    ours = small(ops, device, n_layer=1 if ops is fused else 2)  # interpreted kernels are slow
    plain = TorchTransformer(ours)
    source, target = batch(device)
    logits, loss = ours(source, target, return_logits=True)
    expected, expected_loss = plain.cpu()(source.cpu(), target.cpu())
    for got, want in ((logits, expected), (loss, expected_loss)):
        torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=0)
    loss.backward()
    expected_loss.backward()
    grads = {name: p.grad.cpu() for name, p in ours.named_parameters()}
    for name, param in plain.named_parameters():
        got = torch.cat([grads.pop(part) for part in our_names(name)])
        torch.testing.assert_close(got, param.grad, atol=1e-5, rtol=0, msg=lambda m, n=name: n + m)
    assert not grads  # every parameter was compared


@torch.no_grad()
def test_cached_logits(ops, device):
    model = small(ops, device, n_layer=1).eval()
    source, target = batch(device)
    logits, _ = model(source, target, return_logits=True)
    memory, cache = model.encode(source), model.empty_cache(len(source), 8)
    tokens = torch.full((len(source),), model.end, device=device)
    for position in range(target.shape[1]):
        step = model.decode(tokens, position, memory, cache)
        tokens = target[:, position].clamp(min=0)
        inside = target[:, position] != PADDING
        torch.testing.assert_close(step[inside], logits[inside, position], atol=1e-5, rtol=0)


def test_the_cross_attention_that_is_drawn():
    model = small().eval()
    source, target = (side[:1] for side in batch())
    target = target[:, :2]
    weights = cross_attention(model, source, target)
    assert weights.shape == (2, H, 2, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, H, 2))


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_a_wide_beam_finds_the_best_of_all(alpha):
    """Compares with all targets of up to 3 tokens over a vocabulary of 4."""
    model = small(vocab_size=4).eval()
    source = rows((5, 3), SOURCE_V)
    ends = [[*body, 3] for n in range(3) for body in itertools.product(range(3), repeat=n)]
    cut_off = [list(body) for body in itertools.product(range(3), repeat=3)]
    for i, found in enumerate(beam_search(model, source, 4, alpha, max_tokens=3)):
        scores = {}
        for target in ends + cut_off:
            logits, _ = model(source[i : i + 1], torch.tensor([target]), return_logits=True)
            sums = logits[0].log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum()
            scores[tuple(target)] = sums.item() / ((5 + len(target)) / 6) ** alpha
        best = max(scores, key=lambda target: scores[target])
        kept = tuple(found if len(found) == 3 else [*found, 3])
        assert scores[kept] == pytest.approx(scores[best], abs=1e-6)


def test_beam_search_of_a_source_does_not_depend_on_its_batch():
    model = small().eval()
    source = rows((5, 3, 1), SOURCE_V)
    together = beam_search(model, source, beam=3)
    assert together == [beam_search(model, row[None, row != PADDING], beam=3)[0] for row in source]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns(device, dtype):
    """With dropout, for each dtype and each way of storing the weights in training."""
    model = small(device=device, dropout=0.1).train()
    optimizer: torch.optim.Optimizer = model.configure_optimizers(0.0, 1e-2, (0.9, 0.98), device)
    if dtype == torch.bfloat16:
        optimizer = MasterAdamW(model, dtype, 0.0, 1e-2, (0.9, 0.98))
    context = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    step = Step(model, optimizer, torch.device(device), grad_clip=1.0, autocast=context)
    losses = [step([batch(device)], 1e-2).item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    with context:
        found = beam_search(model.eval(), batch(device)[0], beam=2)
    assert len(found) == 3 and all(0 <= token < V - 1 for row in found for token in row)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(source_vocab_size=0), "source_vocab_size must be at least 1 or None, got 0"),
        (dict(n_head=1, n_embd=15), "n_embd must be even .*, got 15"),
        (dict(label_smoothing=1.0), r"label_smoothing must lie in \[0, 1\), got 1.0"),
    ],
)
def test_refused_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


def test_no_sequence():
    """Like ``GPT``: results with no rows, and the mean loss of nothing (NaN)."""
    model, none = small(), torch.zeros(0, 3, dtype=torch.long)
    logits, loss = model(none, none, return_logits=True)
    assert logits.shape == (0, 3, V) and loss.isnan()
    assert beam_search(model.eval(), none) == []


def test_refused_arguments():
    model = small().eval()
    with pytest.raises(ValueError, match="at most block_size 8 tokens, got 9"):
        model(torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    source = torch.zeros(1, 2, dtype=torch.int64)
    for options, message in (
        (dict(beam=V + 1), r"beam must lie in \[1, 11\]"),
        (dict(length_penalty=-1.0), r"length_penalty must lie in \[0, 10\]"),
        (dict(max_tokens=9), r"max_tokens must lie in \[1, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            beam_search(model, source, **options)
    with torch.no_grad():
        model.ln_decoder.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError):
        beam_search(model, source)
