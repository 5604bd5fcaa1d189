"""Generation with and without the KV cache."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import GPT, Bigram, GPTConfig
from fastgpt.generation import NOT_FINITE, Generator, Sampling, draw
from fastgpt.kernels import fused, reference, torch_ops
from fastgpt.sampler import round_matrices
from tests.tools.small_models import BLOCK, V, small_model, tokens

GREEDY = Sampling(temperature=0.0)


def sharp_model(**changes: Any) -> GPT:
    """A model with logits far apart: rounding changes no token, a wrong key or position does."""
    model = small_model(**changes).eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 2:
                param.mul_(8)
    return model


@torch.no_grad()
def without_cache(
    model: GPT, idx: Tensor, n_tokens: int, temperature: float = 0.0, top_k: int | None = None
) -> Tensor:
    """Generate with a forward pass over the whole window for every token."""
    for _ in range(n_tokens):
        logits = model(idx[:, -model.config.block_size :])[0][:, -1]
        if temperature == 0.0:
            drawn = logits.argmax(dim=-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, V)).values[:, -1:]] = -math.inf
            drawn = torch.multinomial(logits.softmax(-1), 1)
        idx = torch.cat((idx, drawn), dim=1)
    return idx


class Calls:
    """Counts the calls of a model's forward, prefill and decode passes."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of = {"forward": 0, "_prefill": 0, "_decode": 0}
        for name in self.of:
            monkeypatch.setattr(model, name, self._counted(name, getattr(model, name)))

    def _counted(self, name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.of[name] += 1
            return method(*args, **kwargs)

        return call


# ------------------------------------------------------------------------------ with and without


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch, prompt", [(1, 1), (3, 30)])
def test_greedy_past_the_window(
    batch: int, prompt: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sharp_model(block_size=150, bias=bias)
    idx = tokens(batch, prompt)
    expected = without_cache(model, idx, 200)
    assert all(len(row.unique()) > 5 for row in expected)
    calls = Calls(model, monkeypatch)
    assert torch.equal(model.generate(idx, 200, temperature=0.0), expected)
    # Token 150 is the last one fed within the window; each later one takes a pass over a window.
    cached = 150 - prompt
    assert calls.of == {"_prefill": 1, "_decode": cached, "forward": 199 - cached}


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
def test_draws_past_the_window_are_nanogpts(temperature: float, top_k: int | None) -> None:
    model = small_model().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # a wrong temperature or top-k changes the draws
    prompt = tokens(2, 3)
    torch.manual_seed(7)
    expected = without_cache(model, prompt, 20, temperature, top_k)
    torch.manual_seed(7)
    assert torch.equal(model.generate(prompt, 20, temperature, top_k), expected)


def test_what_generate_leaves_alone() -> None:
    """Mode, prompt and gradients stay; in greedy generation the random generator, too."""
    model, prompt = small_model(dropout=0.5), tokens(1, 2)
    kept = prompt.clone()
    out = model.generate(prompt, 3)
    assert model.training and torch.equal(prompt, kept) and not out.requires_grad
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    state = torch.get_rng_state()
    greedy = model.generate(prompt, 3, temperature=0)
    assert torch.equal(model.generate(prompt.int(), 3, 0.0, top_k=3), greedy)
    assert torch.equal(torch.get_rng_state(), state) and not model.training


OPS = pytest.mark.parametrize(
    "ops", [fused, torch_ops, reference], ids=["fused", "torch_ops", "reference"]
)


@OPS
def test_cached_logits_are_those_of_the_forward(ops: Any, device: str) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(BLOCK, V, 2, 2, 32), ops=ops).eval().to(device)
    idx, lengths = tokens(3, BLOCK).to(device), [1, 5, 9]
    cache: list[Tensor] = []
    with torch.no_grad():
        last = torch.tensor(lengths, device=device) - 1
        logits = model._prefill(idx[:, :9], last, BLOCK, cache)
        for step in range(4):
            for row, length in enumerate(lengths):
                expected = model(idx[row : row + 1, : length + step])[0][0, -1]
                torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)
            positions = torch.tensor(lengths, device=device) + step
            drawn = idx.gather(1, positions[:, None])[:, 0]
            logits = model._decode(drawn, positions, cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """In half precision logits are only close, so the tokens need not agree."""
    model = sharp_model().to(dtype)
    idx = tokens(2, 5)
    if dtype == torch.float64:
        expected = without_cache(model, idx, 20)
        assert torch.equal(model.generate(idx, 20, temperature=0.0), expected)
    cache: list[Tensor] = []
    with torch.no_grad():
        model._prefill(idx, torch.tensor([4, 4]), 8, cache)
        logits = model._decode(torch.tensor([1, 2]), torch.tensor([5, 5]), cache)
        whole = model(torch.cat((idx, torch.tensor([[1], [2]])), dim=1))[0][:, -1]
    assert cache[0].dtype == logits.dtype == dtype
    error = (logits - whole).double().norm() / whole.double().norm()
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("ops", "bias"), [(fused, True), (torch_ops, True), (torch_ops, False)])
def test_autocast_with_half_precision_matrices(ops: Any, bias: bool) -> None:
    """As in `fastgpt sample`: same tokens as when autocast casts the matrices for each product."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(BLOCK, V, 1, 2, 32, bias=bias), ops=ops).eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(tokens(2, 3), 20, temperature=0.0)
    round_matrices(model, torch.bfloat16)
    assert {p.dtype for p in model.transformer.h.parameters() if p.dim() == 2} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.generate(tokens(2, 3), 20, temperature=0.0), expected)


# --------------------------------------------------------------------------------- several lengths


def streamed(model: Any, prompts: list[Tensor], n_tokens: int, sampling: Sampling) -> list[list]:
    steps = list(model.stream(prompts, n_tokens, sampling))
    assert len(steps) == n_tokens
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("lengths", [(1, 4, 9), (3, 16, 25), (16, 16), (17, 40), (15, 16, 17)])
def test_prompts_of_several_lengths_continue_as_they_do_alone(lengths: tuple[int, ...]) -> None:
    """Prompts inside the window, at its end, past it; they leave it at different times."""
    model = sharp_model()
    prompts = [tokens(1, length, seed=length)[0] for length in lengths]
    together = streamed(model, prompts, 20, GREEDY)
    for prompt, row in zip(prompts, together, strict=True):
        assert row == without_cache(model, prompt[None], 20)[0, len(prompt) :].tolist()


def test_a_row_past_the_window_takes_no_other_row_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp_model()
    prompts = [tokens(1, 4)[0], tokens(1, 14)[0]]
    calls = Calls(model, monkeypatch)
    streamed(model, prompts, 10, GREEDY)  # the long one fits for 3 tokens
    assert calls.of == {"_prefill": 1, "_decode": 9, "forward": 7}


def test_a_bigram_and_dropout_take_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    bigram = Bigram(GPTConfig(BLOCK, V, 1, 1, 1))
    prompts = [tokens(1, 3)[0], tokens(1, 20)[0].int()]
    for row, prompt in zip(streamed(bigram, prompts, 5, GREEDY), prompts, strict=True):
        current = int(prompt[-1])
        for token in row:
            assert token == bigram.table.weight[current].argmax()
            current = token

    model = small_model(dropout=0.3).train()
    torch.manual_seed(5)
    expected = without_cache(model, tokens(2, 3), 20, temperature=1.0)
    torch.manual_seed(5)
    assert torch.equal(model.generate(tokens(2, 3), 20), expected)
    streamed(model, prompts, 3, GREEDY)
    for dropout, training, forwards in ((0.3, True, 5), (0.3, False, 0), (0.0, True, 0)):
        model = small_model(dropout=dropout).train(training)
        calls = Calls(model, monkeypatch)
        model.generate(tokens(2, 3), 5)
        assert calls.of["forward"] == forwards and calls.of["_decode"] == (0 if forwards else 4)
        assert model.training is training


@pytest.mark.parametrize(
    ("layer", "name"), [("drop", "p"), ("h.1.attn", "dropout"), ("h.0.mlp.dropout", "p")]
)
def test_dropout_that_was_turned_on_later_takes_the_window(
    layer: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    setattr(model.transformer.get_submodule(layer), name, 0.3)
    calls = Calls(model, monkeypatch)
    model.generate(tokens(2, 3), 5)
    assert calls.of == {"forward": 5, "_prefill": 0, "_decode": 0}
    model.eval().generate(tokens(2, 3), 5)
    assert calls.of == {"forward": 5, "_prefill": 1, "_decode": 4}


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_a_generator_begins_anew_with_each_call(penalty: float) -> None:
    """Buffers are reused if the sizes agree."""
    model = sharp_model()
    sampling = Sampling(temperature=0.0, repetition_penalty=penalty)
    generator = Generator(model, sampling)
    for seed, lengths in enumerate([(3, 9), (9, 2), (9, 14), (9,), (3, 9)]):
        prompts = [tokens(1, length, seed=seed + length)[0] for length in lengths]
        got = torch.stack(list(generator(prompts, 12)), dim=1).tolist()
        assert got == streamed(model, prompts, 12, sampling)


def test_no_token_no_row_and_no_window() -> None:
    model = small_model()
    assert torch.equal(model.generate(tokens(2, 3), 0), tokens(2, 3))
    assert list(model.stream([tokens(1, 3)[0]], 0)) == []
    model = sharp_model(block_size=1)  # a window of one token: nothing can be cached
    expected = without_cache(model, tokens(2, 1), 5)
    assert torch.equal(model.generate(tokens(2, 1), 5, temperature=0.0), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_captured_step_draws_the_same(temperature: float, monkeypatch: Any) -> None:
    model = sharp_model(block_size=64).cuda()
    sampling = Sampling(temperature=temperature, top_k=50, repetition_penalty=1.2)
    prompts = [tokens(1, 3)[0].cuda(), tokens(1, 9)[0].cuda()]
    torch.manual_seed(3)
    captured = [streamed(model, prompts, 40, sampling) for _ in range(2)]
    monkeypatch.setattr("fastgpt.generation.Graphed", lambda step, device: step)
    torch.manual_seed(3)
    assert captured == [streamed(model, prompts, 40, sampling) for _ in range(2)]


def test_the_penalty_counts_prompt_and_drawn_tokens() -> None:
    model = sharp_model()
    prompt = tokens(1, 3)[0]
    plain = streamed(model, [prompt], 12, GREEDY)[0]
    strong = Sampling(temperature=0.0, repetition_penalty=1e9)
    (row,) = streamed(model, [prompt], 12, strong)
    seen = prompt.tolist() + row
    assert len(set(plain)) < 12 and len(set(seen)) == len(set(prompt.tolist())) + 12


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite(value: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    drawn = draw(logits, Sampling(temperature=temperature)).tolist()
    assert drawn[0] >= 0 and drawn[1] == NOT_FINITE
    model = small_model()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(value)
    with pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
        model.generate(tokens(1, 3), 4, temperature=temperature)
    steps = model.stream([tokens(1, 3)[0]], 4, Sampling(temperature=temperature))
    with pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
        next(steps)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "prompts must hold at least one prompt, got none"),
        ([tokens(1, 3)], ValueError, r"prompts\[0\] must have shape \(T,\), got \(1, 3\)"),
        ([torch.tensor([1.0])], TypeError, r"prompts\[0\] must be torch.int64 .*float32"),
        ([tokens(1, 3)[0], torch.tensor([], dtype=torch.int64)], ValueError, r"prompts\[1\] must"),
        ([torch.tensor([V])], ValueError, r"prompts\[0\] must hold token ids from 0 to 64"),
        ([[1, 2]], TypeError, r"prompts\[0\] must be a torch.Tensor, got list"),
    ],
)
def test_prompts_that_are_refused(prompts: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        small_model().stream(prompts, 3)


@pytest.mark.parametrize(
    ("prompt", "n_tokens", "error", "message"),
    [
        (tokens(1, 0), 1, ValueError, r"idx must have shape .* T of at least 1, got \(1, 0\)"),
        (torch.tensor([[1, V]]), 1, ValueError, r"idx must .* 0 to 64 .*got 65"),
        (torch.tensor([[-1, 2]]), 1, ValueError, r"idx must .* 0 to 64 .*got -1"),
        (tokens().float(), 1, TypeError, r"idx must be torch.int64 .*float32"),
        (tokens(), -1, ValueError, "max_new_tokens must be at least 0, got -1"),
        (tokens(), 2.0, TypeError, "max_new_tokens must be an integer, got 2.0"),
    ],
)
def test_generate_refuses(
    prompt: Tensor, n_tokens: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        small_model().generate(prompt, n_tokens)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, got -1"):
        small_model().stream([tokens(1, 3)[0]], -1)
