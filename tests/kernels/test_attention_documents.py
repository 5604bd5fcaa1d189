"""Attention of several documents in one sequence (``starts``): parity of outputs and gradients, and
that no document knows of another.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.kernels import configs, fused, reference, torch_ops
from fastgpt.kernels.configs import Attention
from fastgpt.kernels.costs import COSTS
from tests.kernels.test_attention_semantics import TILES
from tests.tools import parity
from tests.tools.documents import DOCUMENTS, starts_of
from tests.tools.sanitizer import sanitize

OPTIONS = [("documents",), ("dropout", "documents")]
CASES = pytest.mark.parametrize("length,borders", DOCUMENTS, ids=str)


def _seed(device: str) -> Tensor:
    return torch.tensor([0x1234_5678_9ABC_DEF], device=device)


def _qkv(device: str, length: int, batch: int = 1, dtype=torch.float32) -> list[Tensor]:
    return list(torch.randn(3, batch, 2, length, 16, device=device).to(dtype))


def _results(op: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, then the gradients of all inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@CASES
def test_parity_packed(device: str, length: int, borders: list[int], dtype: torch.dtype) -> None:
    """The second sequence has other borders."""
    case = DOCUMENTS.index((length, borders))
    n_head, head_size = 1 + case % 3, (16, 25, 64)[case % 3]
    starts = starts_of(length, borders, borders[::2], device=device)
    qkv = parity.randn((2, length, 3 * n_head * head_size), dtype, device, parity.LAYOUTS[case % 4])
    grad = parity.randn((2, length, n_head * head_size), dtype, device, "transposed")
    kernel, plain = (
        partial(m.attention_qkvpacked, n_head=n_head, starts=starts) for m in (fused, reference)
    )
    parity.assert_parity(kernel, plain, plain, [qkv], grad, ["qkv"])


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("length,borders", DOCUMENTS[2:], ids=str)
def test_parity_separate_with_dropout(
    device: str, length: int, borders: list[int], dtype: torch.dtype
) -> None:
    """Not where all documents have one token: there dq and dk are 0, but for the rounding of O, of
    which the plain op knows nothing."""
    q, k, v, grad = torch.randn(4, 1, 2, length, 25, device=device).to(dtype)
    starts = starts_of(length, borders, device=device)
    options: dict[str, Any] = dict(dropout_p=0.3, seed=_seed(device), scale=0.3, starts=starts)
    kernel, plain = (partial(m.attention, **options) for m in (fused, reference))
    parity.assert_parity(kernel, plain, plain, [q, k, v], grad, ["q", "k", "v"])


@CASES
def test_torch_ops(length: int, borders: list[int]) -> None:
    inputs, grad = _qkv("cpu", length), torch.randn(1, 2, length, 16)
    starts = starts_of(length, borders)
    ops = [partial(m.attention, starts=starts) for m in (torch_ops, reference)]
    for x, y in zip(*(_results(op, inputs, grad) for op in ops), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@CASES
@pytest.mark.parametrize("module", [fused, torch_ops, reference])
def test_documents_are_what_they_are_alone(module, length: int, borders: list[int]) -> None:
    inputs, grad = _qkv("cpu", length), torch.randn(1, 2, length, 16)
    together = _results(partial(module.attention, starts=starts_of(length, borders)), inputs, grad)
    for begin, end in zip([0, *borders], [*borders, length], strict=True):
        parts = [x[:, :, begin:end] for x in (*inputs, grad)]
        alone = _results(module.attention, parts[:3], parts[3])
        for x, y in zip(together, alone, strict=True):
            torch.testing.assert_close(x[:, :, begin:end], y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 64, 150])
def test_one_document_gives_the_same_bits_as_none(
    monkeypatch: pytest.MonkeyPatch, device: str, length: int, dtype: torch.dtype, dropout_p: float
) -> None:
    """By the same tiles, that is: on a GPU documents may have others, and sums another order."""
    find = configs.find
    monkeypatch.setattr(configs, "find", lambda *asked: find(*asked[:4], *OPTIONS[dropout_p > 0]))
    inputs = _qkv(device, length, 2, dtype)
    grad = torch.randn_like(inputs[0])
    op = partial(fused.attention, dropout_p=dropout_p, seed=_seed(device))
    starts = starts_of(length, [], [], device=device)
    runs = [_results(partial(op, starts=s), inputs, grad) for s in (None, starts)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("borders", [[70], [64], [30, 128]], ids=str)
def test_a_document_changes_no_bit_of_another(
    device: str, borders: list[int], dtype: torch.dtype
) -> None:
    """Outputs and every gradient, the documents before it and behind it."""
    length = 140
    inputs = _qkv(device, length, dtype=dtype)
    grad = torch.randn_like(inputs[0])
    op = partial(fused.attention, starts=starts_of(length, borders, device=device))
    before = _results(op, inputs, grad)
    for begin, end in zip([0, *borders], [*borders, length], strict=True):
        changed = [x.clone() for x in (*inputs, grad)]
        for x in changed:
            x[:, :, begin:end] = torch.randn_like(x[:, :, begin:end])
        after = _results(op, changed[:3], changed[3])
        for x, y in zip(before, after, strict=True):
            assert torch.equal(x[:, :, :begin], y[:, :, :begin])
            assert torch.equal(x[:, :, end:], y[:, :, end:])
            assert not torch.equal(x[:, :, begin:end], y[:, :, begin:end])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("place", [20, 64, 90])
def test_what_is_not_finite_in_another_document_never_leaks(
    device: str, place: int, which: str, poison: float
) -> None:
    """Outputs and their dq keep every bit; of a key or value, dk and dv as well. (A query that is
    not finite is multiplied by the zeros of its neighbours' dk.)"""
    borders, length = [40, 100], 150
    begin, end = (0, 40) if place < 40 else (40, 100)
    inputs = dict(zip("qkv", _qkv(device, length), strict=True))
    grad = torch.randn_like(inputs["q"])
    grad[:, :, begin:end] = 0.0
    op = partial(fused.attention, starts=starts_of(length, borders, device=device))
    before = _results(op, list(inputs.values()), grad)
    inputs[which][:, :, place] = poison
    after = _results(op, list(inputs.values()), grad)
    for x, y in list(zip(before, after, strict=True))[: 2 if which == "q" else 4]:
        assert torch.equal(x[:, :, :begin], y[:, :, :begin])
        assert torch.equal(x[:, :, end:], y[:, :, end:])
    assert not after[0][:, :, place].isfinite().all(), "the token that is not finite must show"


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_shape_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]
) -> None:
    """Wide and tall tiles meet the borders in different places."""
    monkeypatch.setattr(configs, "find", lambda *asked: Attention(*tile, 4, 1))
    starts = starts_of(150, [17, 18, 64, 140], [3])
    inputs = list(torch.randn(3, 2, 1, 150, 16))
    grad = torch.randn_like(inputs[0])
    options: dict[str, Any] = dict(dropout_p=0.2, seed=torch.tensor([7]), starts=starts)
    ops = [partial(m.attention, **options) for m in (fused, reference)]
    with sanitize():
        found = [_results(op, inputs, grad) for op in ops]
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_m,block_n", [(64, 16), (32, 32), (16, 64)])
@pytest.mark.parametrize("borders", [[], [20], [100], [33, 64, 148]], ids=str)
def test_pipelined_pv_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, borders: list[int], block_m: int, block_n: int
) -> None:
    inputs, runs = _qkv("cpu", 150, dtype=torch.bfloat16), []
    for pipelined in (False, True):
        config = Attention(block_m, block_n, 4, 1, pipelined)
        monkeypatch.setattr(configs, "find", lambda *asked, config=config: config)
        with sanitize(), torch.no_grad():
            runs.append(fused.attention(*inputs, starts=starts_of(150, borders)))
    assert torch.equal(*runs)


@pytest.mark.parametrize("kind", ["random", "falling", "behind", "extreme"])
def test_whatever_starts_holds_is_within_bounds(device: str, kind: str) -> None:
    """The sanitizer sees every address; each query sees itself at least, so outputs are finite."""
    length = 150
    places = torch.arange(length, dtype=torch.int32)
    extreme = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)
    starts = {
        "random": torch.randint(-300, 300, (2, length), dtype=torch.int32),
        "falling": places.flip(0).expand(2, length),
        "behind": (places + 70).expand(2, length),
        "extreme": extreme[torch.randint(2, (2, length))],
    }[kind]
    inputs = _qkv(device, length, batch=2)
    op = partial(fused.attention, starts=starts.to(device))
    assert _results(op, inputs, torch.randn_like(inputs[0]))[0].isfinite().all()


def test_expanded_starts(device: str) -> None:
    inputs = _qkv(device, 90, batch=3)
    grad = torch.randn_like(inputs[0])
    row = starts_of(90, [30, 71], device=device)
    runs = [
        _results(partial(fused.attention, starts=s), inputs, grad)
        for s in (row.expand(3, 90), row.repeat(3, 1))
    ]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_two_runs_give_the_same_bits(device: str) -> None:
    inputs = _qkv(device, 130)
    grad = torch.randn_like(inputs[0])
    op = partial(fused.attention, starts=starts_of(130, [10, 100], device=device))
    runs = []
    for seed in (1, 2):
        with sanitize(seed=seed):  # interpreted: also in another order of the programs
            runs.append(_results(op, inputs, grad))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p: float) -> None:
    inputs = [torch.randn(1, 2, 9, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    op = partial(
        fused.attention, dropout_p=dropout_p, seed=_seed("cpu"), starts=starts_of(9, [1, 4])
    )
    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)


def test_cost_is_that_of_causal_attention() -> None:
    """A formula reads no values."""
    qkv, starts = torch.randn(1, 9, 96), starts_of(9, [2, 5])
    op = torch.ops.fastgpt.attention_qkvpacked
    costs = [
        COSTS[op](op(*args), *args)
        for args in ((qkv, None, s, 2, True, 0.25, 0.0, 0) for s in (None, starts))
    ]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("module", [fused, torch_ops, reference])
def test_errors(module) -> None:
    q, k = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 5, 8)
    starts = starts_of(4, [], [1])
    cases: list[tuple[type[Exception], str, tuple[Tensor, ...], dict[str, Any]]] = [
        (TypeError, "starts must be a torch.Tensor, got list", (q, q, q), {"starts": [[0] * 4]}),
        (TypeError, "starts must be torch.int32, got torch.int64", (q, q, q),
         {"starts": starts.long()}),
        (ValueError, r"starts must have shape \(2, 4\) to go with q \(2, 2, 4, 8\), got \(1, 4\)",
         (q, q, q), {"starts": starts[:1]}),
        (ValueError, r"starts must be on the device of q \(cpu\), got meta",
         (q, q, q), {"starts": starts.to("meta")}),
        (ValueError, "starts must be None with causal=False", (q, q, q),
         {"starts": starts, "causal": False}),
        (ValueError, r"starts must be None unless q and k are equally long, got q \(2, 2, 4, 8\) "
         r"and k \(2, 2, 5, 8\)", (q, k, k), {"starts": starts}),
    ]  # fmt: skip
    for error, message, args, options in cases:
        with pytest.raises(error, match=message):
            module.attention(*args, **options)
    qkv = torch.randn(2, 4, 48)
    with pytest.raises(ValueError, match=r"starts must have shape \(2, 4\) to go with qkv"):
        module.attention_qkvpacked(qkv, 2, starts=starts[:, :3])
    with pytest.raises(ValueError, match="starts must be None with causal=False"):
        module.attention_qkvpacked(qkv, 2, causal=False, starts=starts)
