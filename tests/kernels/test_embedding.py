"""Token + position embedding + dropout in Triton against the plain ops: parity, the mask, ids out
of range, frequent tokens, determinism."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.kernels import fused, reference, torch_ops
from fastgpt.kernels.embedding import ROW_BLOCK
from tests.tools import parity
from tests.tools.documents import starts_of

SHAPES: list[tuple[int, ...]] = [  # B, T, P, V, C
    (1, 1, 1, 1, 1),
    (1, 1, 4, 65, 32),
    (3, 17, 17, 50, 65),
    (2, 40, 64, 1, 128),
    (2, 2 * ROW_BLOCK, 2 * ROW_BLOCK, 3, 25),
    (5, 3, 3, 1000, 768),
    (1, 9, 9, 7, 1600),
    (1, 70, 70, 3, 1025),
    (33, 2, 5, 40, 48),
    (0, 5, 8, 11, 16),
    (3, 0, 4, 11, 16),
]
NAMES = ["token_weight", "position_weight"]


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str = "contiguous"
) -> tuple[Tensor, list[Tensor]]:
    batch, length, n_positions, n_vocab, width = shape
    idx = torch.randint(n_vocab, (length, batch), device=device).t()  # not contiguous
    return idx, [parity.randn((n, width), dtype, device, layout) for n in (n_vocab, n_positions)]


def _doc_start(device: str, length: int, batch: int) -> Tensor:
    """Another border in each sequence, and a document of one token in those that are long enough"""
    rows = [
        [b for b in (1 + 2 * i, length // 2, length // 2 + 1) if b < length] for i in range(batch)
    ]
    return starts_of(length, *rows, device=device)


def _assert_parity(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, common: Any = torch_ops, **options: Any
) -> None:
    """Memory layouts and integer types in turn."""
    i = SHAPES.index(shape)
    idx, weights = _inputs(shape, dtype, device, parity.LAYOUTS[i % len(parity.LAYOUTS)])
    idx = idx.int() if i % 2 else idx
    grad = parity.randn((*shape[:2], shape[4]), dtype, device, "transposed")
    kernel, pytorch, plain = (
        partial(module.embedding, idx, **options) for module in (fused, common, reference)
    )
    parity.assert_parity(kernel, pytorch, plain, weights, grad, NAMES)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_parity(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _assert_parity(device, shape, dtype)


@pytest.mark.parametrize(
    "shape,dtype",
    [*(((3, 17, 17, 50, 65), d) for d in parity.DTYPES), ((1, 70, 70, 3, 1025), torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("documents", [False, True])
def test_parity_with_dropout(
    device: str, documents: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    doc_start = _doc_start(device, shape[1], shape[0]) if documents else None
    seed = torch.tensor([2**40 + 3], device=device)
    options = dict(dropout_p=0.2, seed=seed, dropout_offset=5, doc_start=doc_start)
    _assert_parity(device, shape, dtype, reference, **options)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] < 768], ids=str)
def test_parity_of_documents(device: str, shape: tuple[int, ...]) -> None:
    """Each dtype in turn."""
    dtype = parity.DTYPES[SHAPES.index(shape) % 3]
    _assert_parity(device, shape, dtype, doc_start=_doc_start(device, shape[1], shape[0]))


def test_whatever_starts_holds_counts_as_the_nearest_that_is_allowed(device: str) -> None:
    idx, weights = _inputs((2, 5, 5, 7, 16), torch.float32, device)
    wild = torch.tensor([[-1, 2, -(2**31), 2**31 - 1, 0], [4, 3, 2, 1, 0]], dtype=torch.int32)
    places = torch.arange(5, dtype=torch.int32)
    runs = []
    for doc_start in (wild, torch.minimum(wild.clamp(min=0), places)):
        leaves = [x.clone().requires_grad_() for x in weights]
        out = fused.embedding(idx, *leaves, doc_start=doc_start.to(device))
        runs.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("before", [0, 1, 5, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1])
@pytest.mark.parametrize(
    "run", [1, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 2 * ROW_BLOCK - 1, 5 * ROW_BLOCK + 3]
)
def test_runs_of_one_token_wherever_they_meet_the_row_blocks(
    device: str, before: int, run: int
) -> None:
    """Head, whole row blocks and tail of a run, each present or not. Sums of integers are exact."""
    idx = torch.tensor([[0] * before + [1] * run + [2] * 3], device=device)
    idx = idx[:, torch.randperm(idx.shape[1], device=device)]
    weight = torch.zeros(4, 8, device=device, requires_grad=True)
    grad = torch.randint(-50, 50, (1, idx.shape[1], 8), device=device).float()
    out = fused.embedding(idx, weight, torch.zeros(idx.shape[1], 8, device=device))
    (dweight,) = torch.autograd.grad(out, weight, grad)
    assert torch.equal(dweight, torch.zeros_like(weight).index_add(0, idx[0], grad[0]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("documents", [False, True])
def test_ids_out_of_range(
    device: str, documents: bool, dtype: torch.dtype, dropout_p: float
) -> None:
    """Their rows are NaN, all of it; no gradient knows them, and the others are what they were."""
    info = torch.iinfo(dtype)
    idx = torch.tensor([[3, -1, 0], [info.min, 5, info.max], [6, 2, 3]], device=device, dtype=dtype)
    wrong = (idx < 0) | (idx >= 6)
    weights = [torch.randn(n, 40, device=device, requires_grad=True) for n in (6, 3)]
    options: dict[str, Any] = dict(dropout_p=dropout_p, seed=torch.tensor([1], device=device))
    options["doc_start"] = starts_of(3, [1], [], [2], device=device) if documents else None
    out = fused.embedding(idx, *weights, **options)
    expected = reference.embedding(idx.clamp(0, 5), *weights, **options)
    assert out[wrong].isnan().all()
    assert torch.equal(out[~wrong], expected[~wrong])

    grad = torch.randn_like(out)
    blank = grad.masked_fill(wrong[..., None], 0.0)
    grad[wrong] = float("nan")
    got = torch.autograd.grad(out, weights, grad)
    for x, z in zip(got, torch.autograd.grad(expected, weights, blank), strict=True):
        torch.testing.assert_close(x, z)


def test_autocast(device: str) -> None:
    """The residual stream is bfloat16 under its autocast, float32 otherwise; gradients are the
    weights'."""
    idx, weights = _inputs((2, 5, 6, 7, 16), torch.float32, device)
    leaves = [x.requires_grad_() for x in weights]
    plain = fused.embedding(idx, *leaves)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = fused.embedding(idx, *leaves)
    assert torch.equal(out, plain.bfloat16())
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))
    with torch.autocast(device, dtype=torch.float16):
        assert fused.embedding(idx, *leaves).dtype == torch.float32


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("doc_start", [None, starts_of(3, [1], [2])], ids=["one", "several"])
def test_gradcheck(doc_start: Tensor | None, dropout_p: float) -> None:
    idx = torch.tensor([[0, 2, 2], [2, 1, 0]])
    leaves = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 3)]
    seed = torch.tensor([1])
    assert torch.autograd.gradcheck(
        partial(fused.embedding, idx, dropout_p=dropout_p, seed=seed, doc_start=doc_start), leaves
    )
