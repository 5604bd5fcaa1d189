"""Token + position embedding + dropout in Triton against the plain ops: parity, dropout mask, ids
out of range, frequent tokens, determinism."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, ones

from fastgpt.kernels import fused, reference, torch_ops
from fastgpt.kernels.embedding import ROW_BLOCK
from tests.tools import parity
from tests.tools.calls import Call, Cases, Masks, compare, compiled, ids, places, with_seed
from tests.tools.documents import starts_of
from tests.tools.draws import Drawn, Draws

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
    """Different borders in each sequence; long enough ones have a document of one token."""
    rows = [
        [b for b in (1 + 2 * i, length // 2, length // 2 + 1) if b < length] for i in range(batch)
    ]
    return starts_of(length, *rows, device=device)


def _assert_parity(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, common: Any = torch_ops, **options: Any
) -> None:
    """Memory layouts and integer types alternate over the shapes."""
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
    """Dtypes alternate over the shapes."""
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
    """Head, full row blocks and tail of a run, each present or absent. Integer sums are exact."""
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
    """Their rows are all NaN and add nothing to gradients; other rows are unaffected."""
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
    """The residual stream is bfloat16 under bfloat16 autocast, else float32; gradients have the
    weights' dtype."""
    idx, weights = _inputs((2, 5, 6, 7, 16), torch.float32, device)
    leaves = [x.requires_grad_() for x in weights]
    plain = fused.embedding(idx, *leaves)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = fused.embedding(idx, *leaves)
    assert torch.equal(out, plain.bfloat16())
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))
    with torch.autocast(device, dtype=torch.float16):
        assert fused.embedding(idx, *leaves).dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 6), (2, 0)])
@pytest.mark.parametrize("documents", [False, True])
def test_nothing_to_look_up(ops, device: str, shape: tuple[int, int], documents: bool) -> None:
    token, position = (torch.randn(n, 33, device=device, requires_grad=True) for n in (5, 6))
    idx = torch.zeros(shape, dtype=torch.int64, device=device)
    doc_start = idx.int() if documents else None
    out = ops.embedding(idx, token, position, dropout_p=0.5, doc_start=doc_start)
    assert out.shape == (*shape, 33)
    for gradient in torch.autograd.grad(out.sum(), (token, position)):
        assert not gradient.any()


# --------------------------------------------------------------------- the checks of every op


def _call(ops: Any, token: Tensor, position: Tensor, dropout_p: float) -> Tensor:
    idx = torch.arange(12, device=token.device).view(2, 6) % 5
    return ops.embedding(idx, token, position, dropout_p=dropout_p)


def _repeated(ops: Any, token: Tensor, position: Tensor) -> Tensor:
    """Two tokens, one of which fills whole row blocks; with documents."""
    idx = torch.arange(160, device=token.device).view(2, 80) // 150
    doc_start = starts_of(80, [30], [7, 50], device=str(token.device))
    return ops.embedding(idx, token, position, dropout_p=0.1, doc_start=doc_start)


def _drawn(draws: Draws) -> Drawn:
    batch, length, vocab, width = draws.size(3), draws.size(9), draws.size(20), draws.size(70)
    idx, options = draws.integers(vocab, batch, length), draws.dropout()
    if draws.flag():
        options["doc_start"] = draws.doc_start(batch, length)
    tables = [draws.tensor(vocab, width), draws.tensor(length + draws.size(3) - 1, width)]
    return lambda ops, *tables: ops.embedding(idx, *tables, **options), tables


def _masks(n_rows: int, n_cols: int, device: str, **options: Any) -> Masks:
    idx = torch.arange(n_rows, device=device)[None]
    token = torch.ones(n_rows, n_cols, device=device, requires_grad=True)
    out = fused.embedding(idx, token, torch.zeros_like(token), **options)
    return out[0] > 0, torch.autograd.grad(out.sum(), token)[0] > 0


def _compare(dtype: torch.dtype, documents: bool = False, **options: Any) -> None:
    idx, options = torch.randint(50, (3, 40)), with_seed(options)
    if documents:
        options["doc_start"] = starts_of(40, *[[15, 30]] * 3)
    compare(lambda ops, *tables: ops.embedding(idx, *tables, **options), dtype, (50, 72), (64, 72))


EMBEDDING = Cases(
    "embedding",
    valid=dict(idx=ids(2, 5), token_weight=ones(7, 16), position_weight=ones(6, 16)),
    refused={
        r"idx must have shape \(B, T\), got \(5,\)": dict(idx=ids(5)),
        r"token_weight must have shape \(V, C\)": dict(token_weight=ones(16)),
        r"position_weight must have shape \(P, 16\)": dict(position_weight=ones(6, 3)),
        "a row for each of the 5 positions of idx": dict(position_weight=ones(4, 16)),
        "dropout_p must lie in": dict(dropout_p=-0.1),
        "dropout_offset must lie in": dict(dropout_offset=2**31),
        "seed must be an int64 tensor": dict(seed=ids(2)),
        r"doc_start must have shape \(2, 5\) to go with idx": dict(doc_start=places(5)),
        "doc_start must be on the device of idx": dict(doc_start=places(2, 5).to("meta")),
    },
    compiled=[
        compiled("embedding-float32-documents", _compare, torch.float32, documents=True),
        compiled("embedding-float32", _compare, torch.float32),
        compiled("embedding-float16-dropout", _compare, torch.float16, dropout_p=0.2),
        compiled("embedding-bfloat16", _compare, torch.bfloat16),
    ],
    calls={  # empty inputs: see test_nothing_to_look_up
        "": Call([(5, 33), (6, 33)], partial(_call, dropout_p=0.0), single=[(5, 1), (6, 1)]),
        "dropout": Call([(5, 33), (6, 33)], partial(_call, dropout_p=0.5)),
    },
    variants={
        "repeated": Call(
            [(2, 33), (80, 33)], _repeated, several=(torch.float32, [(2, 65), (80, 65)])
        )
    },
    drawn=_drawn,
    masks=_masks,
)
