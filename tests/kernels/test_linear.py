"""The linear layer, whose weight gradient is a Triton GEMM, against the plain op: parity with both
ways of loading tiles, split-K, saved tensors, frozen parameters.
"""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, ones

from fastgpt.kernels import configs, fused, gemm, reference, torch_ops
from fastgpt.kernels.linear import rows
from tests.tools import parity
from tests.tools.calls import Call, Cases, compare, compiled
from tests.tools.draws import Drawn, Draws

# (shape of x, outputs): not multiples of a tile; rows that TMA cannot copy; empty.
SHAPES = [
    ((1, 16), 8),
    ((3, 40), 24),
    ((130, 96), 136),
    ((2, 65, 72), 200),
    ((1, 1, 256), 8),
    ((300, 64), 72),
    ((9, 25), 31),
    ((2, 3, 7), 1),
    ((0, 16), 8),
]
NAMES = ["x", "weight", "bias"]


@pytest.fixture(params=["tma", "pointers"])
def loads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to load a tile in the interpreter; a GPU supports one of them."""
    if request.param == "pointers":
        monkeypatch.setattr(gemm, "_tma", lambda device: False)
    return request.param


def _inputs(shape: tuple[int, ...], n: int, dtype: torch.dtype, device: str, layout: str):
    k = shape[-1]
    weight = parity.randn((n, k), dtype, device, layout) * k**-0.5
    return [
        parity.randn(shape, dtype, device, layout),
        weight,
        parity.randn((n,), dtype, device, "strided"),
    ]


@pytest.mark.parametrize("shape,n", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_parity(
    device: str,
    shape: tuple[int, ...],
    n: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The two ways to load a tile alternate."""
    i = SHAPES.index((shape, n))
    if (i + parity.DTYPES.index(dtype)) % 2:
        monkeypatch.setattr(gemm, "_tma", lambda device: False)
    inputs = _inputs(shape, n, dtype, device, parity.LAYOUTS[i % len(parity.LAYOUTS)])
    count = 2 if i % 3 == 0 else 3
    grad = parity.randn((*shape[:-1], n), dtype, device, "transposed")
    ops = fused.linear, torch_ops.linear, reference.linear
    parity.assert_parity(*ops, inputs[:count], grad, NAMES[:count])


@pytest.mark.parametrize(
    "tile", [(16, 32, 16, 4, 1, 1), (32, 16, 32, 4, 1, 3), (64, 64, 64, 4, 1, 9)]
)
@pytest.mark.parametrize("n_splits", [1, 3])
def test_any_tile_and_split(
    device: str, loads: str, monkeypatch: pytest.MonkeyPatch, tile: tuple, n_splits: int
) -> None:
    if device == "cuda":
        pytest.skip("the GPU's tables are its own")
    monkeypatch.setattr(gemm, "_config", lambda *asked, **options: configs.Gemm(*tile))
    monkeypatch.setattr(gemm, "splits", lambda *args: n_splits)
    dy, x = torch.randn(77, 40), torch.randn(77, 48)
    dweight, dbias = gemm.weight_gradient(dy, x, True, torch.float32)
    torch.testing.assert_close(dweight.double(), dy.double().T @ x.double(), rtol=1e-5, atol=1e-5)
    assert dbias is not None
    torch.testing.assert_close(dbias.double(), dy.double().sum(0), rtol=1e-5, atol=1e-5)


def test_splits_fill_the_multiprocessors() -> None:
    """An H200 runs 264 programs of 128 x 128 at once. GPT-2's projection has 36 tiles: without a
    split six sevenths of the GPU would idle. Long sums are split, short ones are not."""
    assert gemm.splits(768, 768, 65536, 36, 264) == 7
    for m, n in itertools.product((768, 2304, 3072), (768, 3072)):
        tiles = m * n // 128**2
        parts = gemm.splits(m, n, 65536, tiles, 264)
        waves = tiles * parts / 264
        assert waves / -(-waves // 1) > 0.8, (m, n, parts)  # the last wave is mostly full
    assert gemm.splits(768, 768, 64, 36, 264) == 1
    assert gemm.splits(50304, 768, 4096, 393 * 6, 264) == 1


@pytest.mark.parametrize("width", [16, 15])  # rows of 15 go to the library
def test_a_weight_gradient_is_summed_in_float32(device: str, width: int) -> None:
    """In half precision, sums of 4097 ones or small values would stop growing and results would be
    rounded."""
    x = torch.full((4097, 16), 2**-6, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(width, 16, device=device, requires_grad=True)
    bias = torch.zeros(width, device=device, requires_grad=True)
    y = fused.linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    dweight, dbias = torch.autograd.grad(y, (weight, bias), torch.full_like(y, 1.0078125))
    assert dweight.dtype == dbias.dtype == torch.float32
    assert torch.equal(dweight, torch.full_like(dweight, 4097 * 1.0078125 * 2**-6))
    assert torch.equal(dbias, torch.full_like(dbias, 4097 * 1.0078125))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_weight_and_not_its_gradient(device: str, dtype: torch.dtype) -> None:
    x, weight, bias = _inputs((9, 16), 24, torch.float32, device, "contiguous")
    weight.requires_grad_(), bias.requires_grad_()
    with torch.autocast(device, dtype):
        y = fused.linear(x, weight, bias)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    expected = torch.ones(9, 24, device=device).T @ x.to(dtype).float()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5)  # not rounded to dtype


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1), (9, 24)], ids=str)
def test_rows_of_an_expanded_gradient_have_strides(shape: tuple[int, int]) -> None:
    """Tensor descriptors and some library routines do not support a stride of 0."""
    for x in (torch.ones(()), torch.ones(shape[1])):
        assert rows(x.expand(shape)).stride() == (shape[1], 1)


def test_the_stride_of_a_single_row_or_column_means_nothing(device: str) -> None:
    """PyTorch calls such a tensor contiguous for any strides; a tensor descriptor does not."""
    odd = torch.randn(1, 8, device=device).as_strided((1, 1), (8, 4))
    x = torch.randn(1, 16, device=device)
    torch.testing.assert_close(gemm.weight_gradient(odd, x, False, x.dtype)[0], odd * x)


def test_products_of_nothing_are_pytorchs(device: str) -> None:
    """The plain ops, which all others are compared with, agree with PyTorch on empty products."""
    for shapes in LINEAR.calls[""].empty:
        inputs = [torch.randn(shape, device=device) for shape in shapes]
        grad = torch.randn_like(F.linear(*inputs))
        found = [parity.outcome(op, inputs, grad) for op in (reference.linear, F.linear)]
        torch.testing.assert_close(*found)


# --------------------------------------------------------------------- the checks of every op


def _call(ops: Any, *tensors: Tensor) -> Tensor:
    return ops.linear(*tensors)


@pytest.mark.parametrize(("place", "must"), [(0, "be a torch.Tensor"), (3, "be a number")])
def test_parts_of_recompute(ops: Any, place: int, must: str) -> None:
    recompute: list[Any] = [ones(2, 16), ones(16), None, 1e-5]
    recompute[place] = None
    with pytest.raises(TypeError, match=rf"^recompute\[{place}\] must {must}, got None"):
        ops.linear(ones(2, 16), ones(24, 16), recompute=tuple(recompute))


def _of_norm(ops: Any, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    y = ops.layer_norm(x, norm, norm, 1e-3)
    return ops.linear(y, weight, recompute=(x, norm, norm, 1e-3))


def _drawn(draws: Draws) -> Drawn:
    k, n = draws.size(40), draws.size(40)
    return _call, [draws.tensor(*draws.outer(), k), draws.tensor(n, k), *draws.maybe(n)]


LINEAR = Cases(
    "linear",
    valid=dict(x=ones(2, 16), weight=ones(24, 16), bias=ones(24)),
    refused={
        r"weight must have shape \(N, K\) to go with x": dict(weight=ones(16, 24)),
        r"bias must have shape \(24,\) to go with weight": dict(bias=ones(16)),
        "recompute must be .* got 2 items": dict(recompute=(ones(2, 16), ones(16))),
        "recompute must begin with a tensor of x's shape": dict(
            recompute=(ones(1, 16), ones(16), None, 1e-5)
        ),
        r"recompute\[3\] must be at least 0, got -1": dict(
            recompute=(ones(2, 16), ones(16), None, -1)
        ),
    },
    compiled=[
        compiled(
            "linear-float16-splits", compare, _call, torch.float16, (1500, 72), (136, 72), (136,)
        ),
        compiled("linear-bfloat16-splits", compare, _call, torch.bfloat16, (1500, 72), (136, 72)),
        compiled("linear-bfloat16", compare, _call, torch.bfloat16, (70, 72), (136, 72)),
    ],
    calls={
        "": Call(
            [(2, 7, 20), (11, 20), (11,)],
            _call,
            empty=[
                [(0, 2, 20), (11, 20), (11,)],
                [(3, 0), (5, 0), (5,)],
                [(0,), (5, 0), (5,)],
                [(0, 0), (5, 0), (5,)],
                [(3, 20), (0, 20), (0,)],
                [(2, 0, 0), (0, 0), (0,)],
            ],
            single=[(1, 16), (1, 16), (1,)],
            several=(torch.bfloat16, [(300, 64), (72, 64), (72,)]),
        ),
        "recompute": Call(
            [(7, 20), (20,), (11, 20)],
            _of_norm,
            empty=[
                [(0, 20), (20,), (11, 20)],
                [(3, 20), (20,), (0, 20)],
                [(0, 20), (20,), (0, 20)],
            ],
            single=[(1, 16), (16,), (1, 16)],
        ),
    },
    drawn=_drawn,
)
