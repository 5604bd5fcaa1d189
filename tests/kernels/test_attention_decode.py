"""Attention of a new token over the KV cache: against the plain op and against attention over all
tokens at once, with rows at different positions; what it must not change.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, ones, zeros

from fastgpt.kernels import configs, fused, reference, torch_ops
from fastgpt.kernels._attention import MAX_HEAD_SIZE, block_d
from fastgpt.kernels.attention_decode import _attention_decode_op
from tests.tools import interpreter, parity
from tests.tools.calls import Cases, compiled, ids
from tests.tools.draws import Drawn, Draws
from tests.tools.sanitizer import sanitize

IMPLEMENTATIONS = pytest.mark.parametrize(
    "ops", [fused, torch_ops, reference], ids=["fused", "torch_ops", "reference"]
)


def _inputs(
    places: list[int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    n_head: int = 2,
    n_slots: int = 70,
    head_size: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv of a new token, a cache filled up to each row's position, and the positions."""
    batch = len(places)
    qkv = torch.randn(batch, 1, 3 * n_head * head_size, device=device).to(dtype)
    cache = torch.zeros(2, batch, n_head, n_slots, head_size, device=device, dtype=dtype)
    for row, place in enumerate(places):
        cache[:, row, :, :place] = torch.randn(2, n_head, place, head_size).to(dtype)
    return qkv, cache, torch.tensor(places, device=device)


def decoding(cache: Tensor, positions: Tensor) -> Callable[..., Tensor]:
    """``attention_decode`` as a function of qkv: the output and the updated cache in one tensor."""

    def call(ops: Any, qkv: Tensor) -> Tensor:
        mine = cache.to(qkv.dtype, copy=True)
        out = ops.attention_decode(qkv.detach(), mine, positions)
        return torch.cat((out.flatten(), mine.flatten()))

    return call


def _assert_parity(kernel: Any, plain: Any, qkv: Tensor) -> None:
    parity.assert_parity(kernel, plain, plain, [qkv], torch.zeros(1, device=qkv.device), [])


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [1, 8, 25, 64, 80, 128, 256])
def test_parity(device: str, head_size: int, dtype: torch.dtype) -> None:
    """Positions in the first part, on both sides of a boundary between parts, in the last slot."""
    size = block_d(head_size)
    block_n = configs.lookup("attention_decode", "fwd", None, dtype, size).BLOCK_N
    places = [0, 5, block_n - 1, block_n, block_n + 6]
    qkv, cache, positions = _inputs(
        places, dtype, device, n_head=1, n_slots=block_n + 7, head_size=head_size
    )
    call = decoding(cache, positions.int() if dtype == torch.float16 else positions)
    for ops in (fused, torch_ops):
        _assert_parity(partial(call, ops), partial(call, reference), qkv)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu_arithmetic", "gpu_arithmetic"])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_scores_in_the_thousands(device: str, dtype: torch.dtype, gpu: bool) -> None:
    """Scores of several parts, whose sums are combined by their maxima."""
    places = [40, 127, 128, 300]
    qkv, cache, positions = _inputs(places, dtype, device, n_head=4, n_slots=301, head_size=64)
    qkv[..., : 2 * 256] *= 30
    cache[0] *= 30
    call = decoding(cache, positions)

    def kernel(qkv: Tensor) -> Tensor:
        with interpreter.gpu_arithmetic() if gpu else nullcontext():
            return call(fused, qkv)

    _assert_parity(kernel, partial(call, reference), qkv)


@IMPLEMENTATIONS
def test_token_by_token_is_attention_at_once(ops: Any, device: str) -> None:
    """The cache spans three parts."""
    batch, n_head, length, head_size = 2, 2, 140, 40
    qkv = torch.randn(batch, length, 3 * n_head * head_size, device=device)
    cache = torch.zeros(2, batch, n_head, length, head_size, device=device)
    together = reference.attention_qkvpacked(qkv, n_head, scale=0.3)
    for t in range(0, length):
        positions = torch.full((batch,), t, device=device)
        if t % 20 and t + 1 != length:  # what decoding this token would write
            k, v = qkv[:, t].unflatten(1, (3, n_head, head_size)).unbind(1)[1:]
            cache[:, :, :, t] = torch.stack([k, v])
            continue
        y = ops.attention_decode(qkv[:, t : t + 1], cache, positions, scale=0.3)
        torch.testing.assert_close(y, together[:, t : t + 1])


@IMPLEMENTATIONS
def test_a_row_has_the_same_bits_alone_and_changes_nothing_but_its_slot(
    ops: Any, device: str
) -> None:
    places = [3, 69, 30]
    qkv, cache, positions = _inputs(places, device=device)
    before = cache.clone()
    y = ops.attention_decode(qkv, cache, positions)
    again = ops.attention_decode(qkv, before.clone(), positions)
    assert torch.equal(y, again)
    for row, place in enumerate(places):
        alone = before[:, row : row + 1].clone()
        one = ops.attention_decode(qkv[row : row + 1], alone, positions[row : row + 1])
        assert torch.equal(alone[:, 0], cache[:, row])
        if ops is fused:  # PyTorch chooses kernels by shape
            assert torch.equal(one[0], y[row])
        changed = (cache[:, row] != before[:, row]).any(dim=(0, 1, 3))
        assert changed.nonzero().flatten().tolist() == [place]
        k, v = qkv[row, 0].unflatten(0, (3, 2, 16)).unbind(0)[1:]
        assert torch.equal(cache[:, row, :, place], torch.stack([k, v]))


def test_slots_behind_the_token_are_not_read(device: str) -> None:
    qkv, cache, positions = _inputs([3, 65], device=device)
    expected = fused.attention_decode(qkv, cache.clone(), positions)
    for row, place in enumerate([3, 65]):
        cache[:, row, :, place:] = math.nan
    assert torch.equal(fused.attention_decode(qkv, cache, positions), expected)


def test_a_place_outside_gives_nan_and_writes_nothing(device: str) -> None:
    """Tests the operators themselves: the public functions reject such positions if they can."""
    qkv, cache, _ = _inputs([3, 7, 5, 2], device=device)
    positions = torch.tensor([70, 7, -1, 7000], device=device)
    before = cache.clone()
    with sanitize():
        y = _attention_decode_op(qkv, cache, positions, 0.25)
    assert y[[0, 2, 3]].isnan().all() and y[1].isfinite().all()
    assert torch.equal(cache[:, [0, 2, 3]], before[:, [0, 2, 3]])


def test_more_parts_than_are_added_at_a_time(device: str) -> None:
    """The maximum score grows from each group of parts to the next."""
    torch.manual_seed(0)
    n_slots, head_size = 700, 64
    qkv = torch.randn(1, 1, 3 * head_size, device=device)
    cache = torch.randn(2, 1, 1, n_slots, head_size, device=device)
    cache[0] *= torch.linspace(0.1, 3.0, n_slots, device=device)[:, None]
    positions = torch.tensor([n_slots - 1], device=device)
    expected = reference.attention_decode(qkv, cache.clone(), positions)
    got = fused.attention_decode(qkv, cache, positions)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_opcheck(device: str) -> None:
    qkv, cache, positions = _inputs([3, 65], device=device)
    torch.library.opcheck(_attention_decode_op, (qkv, cache, positions, 0.25))


# --------------------------------------------------------------------- the checks of every op


@IMPLEMENTATIONS
def test_no_sequence(ops: Any, device: str) -> None:
    cache, positions = torch.zeros(2, 0, 2, 8, 16, device=device), ids(0).to(device)
    out = ops.attention_decode(torch.zeros(0, 1, 96, device=device), cache, positions)
    assert out.shape == (0, 1, 32)


def test_the_largest_head_size() -> None:
    n = MAX_HEAD_SIZE + 1
    with pytest.raises(ValueError, match=f"cache must have a .* of at most {n - 1}, got {n}"):
        fused.attention_decode(ones(1, 1, 3 * n), zeros(2, 1, 1, 70, n), ids(1))


def _drawn(draws: Draws) -> Drawn:
    """The cache, updated in place, is part of the result."""
    batch, heads, size, slots = draws.size(3), draws.size(3), draws.size(20), draws.size(40)
    positions = torch.randint(slots, (batch,))
    cache = parity.randn((2, batch, heads, slots, size), draws.dtype, "cpu", "contiguous")
    return decoding(cache, positions), [draws.tensor(batch, 1, 3 * heads * size)]


def _compare(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 1, 3 * 2 * 64).to(dtype)
    cache = torch.randn(2, 2, 2, 200, 64).to(dtype)
    kernel, plain = (
        partial(decoding(cache, torch.tensor([0, 150])), ops) for ops in (fused, reference)
    )
    _assert_parity(kernel, plain, qkv)


DECODE = Cases(
    "attention_decode",
    valid=dict(qkv=ones(2, 1, 96), cache=zeros(2, 2, 2, 70, 16), positions=torch.tensor([3, 65])),
    refused={
        r"qkv must have shape \(B, 1, 3C\), got \(2, 2, 96\)": dict(qkv=ones(2, 2, 96)),
        r"cache must have shape \(2, 2, H, S, D\) with .* = 96": dict(cache=zeros(2, 2, 2, 7, 15)),
        r"cache must have shape .*got \(2, 2, 2, 0, 16\)": dict(cache=zeros(2, 2, 2, 0, 16)),
        "cache must be contiguous, got strides": dict(cache=zeros(2, 2, 7, 2, 16).transpose(2, 3)),
        r"positions must have shape \(2,\) to go with qkv": dict(positions=ids(3)),
        r"positions must lie in \[0, 70\), got 70": dict(positions=torch.tensor([3, 70])),
        r"positions must lie in \[0, 70\), got -1": dict(positions=torch.tensor([-1, 3])),
        "scale must be positive and finite, or None, got 0": dict(scale=0.0),
    },
    compiled=[
        compiled(f"decode-{dtype}".replace("torch.", ""), _compare, dtype)
        for dtype in parity.DTYPES
    ],
    calls={},
    drawn=_drawn,
)
