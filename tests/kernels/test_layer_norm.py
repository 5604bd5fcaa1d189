"""LayerNorm in Triton, plain and fused with a residual addition, against the plain ops: parity,
dropout mask, gradients, determinism, saved and shared tensors."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, ones

from fastgpt.kernels import fused, reference, torch_ops
from fastgpt.kernels.layer_norm import MAX_WIDTH
from tests.tools import interpreter, parity
from tests.tools.calls import Call, Cases, Masks, compare, compiled
from tests.tools.draws import Drawn, Draws

# Last dimension: one element, ragged, wide; no rows.
SHAPES = [
    (1, 1),
    (1, 768),
    (37, 65),
    (129, 128),
    (2, 17, 768),
    (3, 1, 1600),
    (5, 4097),
    (3, 8192),
    (5, 8193),
    (2, 16384),
    (0, 32),
    (257, 25),
]

# ----------------------------------------------------------------------------------- layer_norm


def _plain_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str, bias: bool
) -> tuple[list[Tensor], list[str]]:
    n = shape[-1]
    inputs = [parity.randn(shape, dtype, device, layout) * 3 + 1]
    inputs += [parity.randn((n,), dtype, device, "strided") for _ in range(2 if bias else 1)]
    return inputs, ["x", "weight", "bias"][: len(inputs)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_parity(device: str, shape: tuple[int, ...]) -> None:
    """Dtypes alternate; test_parity runs the same kernels in all of them."""
    i = SHAPES.index(shape)
    dtype = parity.DTYPES[(i + i // 3) % 3]
    layout = parity.LAYOUTS[i % len(parity.LAYOUTS)]
    inputs, names = _plain_inputs(shape, dtype, device, layout, bias=i % 3 != 0)
    grad = parity.randn(shape, dtype, device, "transposed")
    ops = fused.layer_norm, torch_ops.layer_norm, reference.layer_norm
    parity.assert_parity(*ops, inputs, grad, names)


@pytest.mark.parametrize(
    ("width", "mean"), [(33, 100.0), (768, 100.0), (768, 1000.0), (768, 10000.0), (5000, 1000.0)]
)
def test_large_mean_loses_no_more_than_pytorch(device: str, width: int, mean: float) -> None:
    """The rounding of a row's sum shows at a standard deviation of 1. Compares with PyTorch's own
    kernel (``parity`` would round only once), on enough rows to rule out luck."""
    inputs, names = _plain_inputs((97, width), torch.float32, device, "contiguous", True)
    sign = torch.randn(97, 1, device=device).sign()
    inputs[0] = inputs[0] + sign * mean * (1.0 + 0.3 * torch.rand(97, 1, device=device))
    grad = torch.randn(97, width, device=device)
    got = parity.results(fused.layer_norm, inputs, grad, torch.float32)
    common = parity.results(torch_ops.layer_norm, inputs, grad, torch.float32)
    truth = parity.results(reference.layer_norm, inputs, grad, torch.float64)
    for name, x, y, z in zip(("y", *names), got, common, truth, strict=True):
        for size in (lambda error: error.abs().max(), lambda error: error.square().mean().sqrt()):
            assert size(x - z) <= 2 * size(y - z) + 1e-5, name


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu_arithmetic", "gpu_arithmetic"])
@pytest.mark.parametrize("width", [41, 48, 55, 1600])
def test_constant_row(device: str, width: int, gpu: bool) -> None:
    """The mean must be exact: a deviation of one bit would be scaled by 316, 1 / sqrt(eps)."""
    x = torch.tensor([[7.0], [-3.0], [11.0]], device=device).expand(3, width)
    weight, bias = torch.randn(2, width, device=device)
    with interpreter.gpu_arithmetic() if gpu else nullcontext():
        y = fused.layer_norm(x, weight, bias)
    assert torch.equal(y, bias.expand(3, width))


@pytest.mark.parametrize("ops", [fused, torch_ops], ids=["fused", "torch_ops"])
def test_float32_weight_with_low_precision_input(device: str, ops) -> None:
    x = torch.randn(4, 64, device=device).bfloat16()
    weight = torch.randn(64, device=device, requires_grad=True)
    y = ops.layer_norm(x, weight)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad is not None
    expected = reference.layer_norm(x.double(), weight.double())
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)


# -------------------------------------------------------------------------- residual_layer_norm

NAMES = ["residual", "delta", "weight", "bias", "delta_bias"]


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str = "contiguous"
) -> dict[str, Any]:
    wide = [parity.randn(shape, dtype, device, layout) for _ in range(2)]
    narrow = [parity.randn(shape[-1:], dtype, device, "strided") for _ in range(3)]
    return dict(zip(NAMES, wide + narrow, strict=True))


def _assert_parity(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    layout: str,
    without: tuple[str, ...],
    common: Callable[..., Any],
    **options: Any,
) -> None:
    """Compare y and total, and their gradients, stacked into one tensor."""
    inputs = _inputs(shape, dtype, device, layout)
    for name in without:
        del inputs[name]
    names = list(inputs)

    def stacked(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda *args: torch.stack(op(**dict(zip(names, args, strict=True)), **options))

    kernel, pytorch, plain = map(
        stacked, (fused.residual_layer_norm, common, reference.residual_layer_norm)
    )
    grad = parity.randn((2, *shape), dtype, device, "transposed")
    parity.assert_parity(kernel, pytorch, plain, list(inputs.values()), grad, names)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_parity(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    i = SHAPES.index(shape)
    layout = parity.LAYOUTS[i % len(parity.LAYOUTS)]
    without = [(), ("bias",), ("delta_bias",), ("bias", "delta_bias")][i // 2 % 4]
    _assert_parity(shape, dtype, device, layout, without, torch_ops.residual_layer_norm)


@pytest.mark.parametrize("shape", [(37, 65), (2, 17, 768), (5, 8193)], ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_parity_with_dropout(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    seed = torch.tensor([2**40 + 3], device=device)
    options = dict(dropout_p=0.2, seed=seed, dropout_offset=5)
    common = reference.residual_layer_norm
    _assert_parity(shape, dtype, device, "contiguous", (), common, **options)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_float32_residual_with_a_half_precision_delta(
    device: str, half: torch.dtype, dropout_p: float
) -> None:
    """The residual stream stays float32; y and delta's gradient have delta's dtype."""
    inputs = _inputs((9, 96), torch.float32, device)
    inputs["delta"] = inputs["delta"].to(half)
    leaves = [x.requires_grad_() for x in inputs.values()]
    seed = torch.tensor([4], device=device)
    options: dict[str, Any] = dict(dropout_p=dropout_p, seed=seed)
    y, total = fused.residual_layer_norm(**inputs, **options)
    dtotal, dy = torch.randn(9, 96, device=device), torch.randn(9, 96, device=device).to(half)
    gradients = torch.autograd.grad((y, total), leaves, (dy, dtotal))

    exact: list[Any] = [x.detach().double().requires_grad_() for x in leaves]
    outputs = reference.residual_layer_norm(**dict(zip(NAMES, exact, strict=True)), **options)
    expected = [*outputs, *torch.autograd.grad(outputs, exact, (dy.double(), dtotal.double()))]
    results = (y, total, *gradients)
    halves = [half, torch.float32, torch.float32, half, *[torch.float32] * 3]
    assert [x.dtype for x in results] == halves
    for x, z in zip(results, expected, strict=True):
        tolerance = torch.finfo(x.dtype).eps if x.dtype == half else 1e-5
        torch.testing.assert_close(x.double(), z, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_sets_the_dtype_of_y_alone(device: str, residual_dtype: torch.dtype) -> None:
    inputs = _inputs((4, 64), torch.float32, device)
    inputs["residual"] = inputs["residual"].to(residual_dtype)
    inputs["delta"] = inputs["delta"].to(residual_dtype)
    y, total = fused.residual_layer_norm(**inputs)
    assert y.dtype == total.dtype == residual_dtype
    with torch.autocast(device, dtype=torch.bfloat16):
        rounded, same = fused.residual_layer_norm(**inputs)
        plain = fused.layer_norm(total, inputs["weight"], inputs["bias"])
    assert rounded.dtype == torch.bfloat16 and same.dtype == residual_dtype
    assert torch.equal(rounded, y.bfloat16()) and torch.equal(same, total)
    assert torch.equal(plain, rounded) and plain.dtype == torch.bfloat16


def test_y_is_the_layer_norm_of_the_stored_sum(device: str) -> None:
    inputs = _inputs((40, 65), torch.bfloat16, device)
    y, total = fused.residual_layer_norm(**inputs)
    assert torch.equal(y, fused.layer_norm(total, inputs["weight"], inputs["bias"]))


# ----------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("used", [0, 1], ids=["y", "total"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_either_output_may_have_no_consumer(device: str, used: int, dropout_p: float) -> None:
    inputs = _inputs((6, 40), torch.float32, device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    seed = torch.tensor([3], device=device)
    grad = torch.randn(6, 40, device=device)

    def gradients(op: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        result = op(**inputs, dropout_p=dropout_p, seed=seed)[used]
        return torch.autograd.grad(result, leaves, grad, materialize_grads=True)

    got, expected = (gradients(m.residual_layer_norm) for m in (fused, reference))
    for x, z in zip(got, expected, strict=True):
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-5)


def test_one_gradient_serves_residual_and_delta(device: str) -> None:
    """Without dropout both gradients are one tensor, written once; with dropout two."""
    inputs = _inputs((6, 40), torch.float32, device)
    leaves = [inputs[name].requires_grad_() for name in ("residual", "delta")]
    for dropout_p, shared in ((0.0, True), (0.5, False)):
        y, _ = fused.residual_layer_norm(**inputs, dropout_p=dropout_p)
        dresidual, ddelta = torch.autograd.grad(y.sum(), leaves)
        assert (dresidual.data_ptr() == ddelta.data_ptr()) == shared


def test_neither_delta_nor_a_mask_is_kept(device: str) -> None:
    inputs = {k: v.requires_grad_() for k, v in _inputs((6, 40), torch.float32, device).items()}
    totals: list[Tensor] = []

    def run() -> Tensor:
        totals.append(fused.residual_layer_norm(**inputs, dropout_p=0.5)[1])
        return totals[0]

    large = [place for place, size in parity.saved_storages(run).items() if size >= 4 * 6 * 40]
    assert large == [totals[0].data_ptr()]


def test_rows_are_independent(device: str) -> None:
    inputs = _inputs((33, 48), torch.float32, device)
    x, weight = inputs["delta"], inputs["weight"]
    before = *fused.residual_layer_norm(**inputs), fused.layer_norm(x, weight)
    x[20] = float("nan")
    after = *fused.residual_layer_norm(**inputs), fused.layer_norm(x, weight)
    others = torch.arange(33, device=device) != 20
    for x, z in zip(before, after, strict=True):
        assert z[20].isnan().all() and torch.equal(x[others], z[others])


# ----------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_at_width_768(device: str, dtype: torch.dtype) -> None:
    """At GPT-2's width, compiled LayerNorm equals eager mode bit for bit for any number of rows."""
    compiled = torch.compile(fused.layer_norm, fullgraph=True)
    for n_rows in (4, 9, 1):
        inputs, _ = _plain_inputs((n_rows, 768), dtype, device, "contiguous", True)
        grad = torch.randn(n_rows, 768, device=device)
        got, expected = (
            parity.results(op, inputs, grad, dtype) for op in (compiled, fused.layer_norm)
        )
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


# --------------------------------------------------------------------- the checks of every op


def test_the_widest_row() -> None:
    x, weight = ones(1, MAX_WIDTH + 1), ones(MAX_WIDTH + 1)
    message = f"must have a last dimension of at most {MAX_WIDTH}, got {MAX_WIDTH + 1}"
    with pytest.raises(ValueError, match=f"^x {message}"):
        fused.layer_norm(x, weight)
    with pytest.raises(ValueError, match=f"^residual {message}"):
        fused.residual_layer_norm(x, x, weight)


def _plain_drawn(draws: Draws) -> Drawn:
    width, eps = draws.width(130), draws.one_of(1e-5, 1e-3)
    inputs = [draws.tensor(*draws.outer(), width), draws.tensor(width), *draws.maybe(width)]
    return lambda ops, x, weight, bias=None: ops.layer_norm(x, weight, bias, eps), inputs


def _drawn(draws: Draws) -> Drawn:
    shape = [*draws.outer(), draws.width(70)]
    names = NAMES[:3] + [name for name in NAMES[3:] if draws.flag()]
    options = draws.dropout()

    def call(ops: Any, *tensors: Tensor) -> Tensor:
        named = dict(zip(names, tensors, strict=True))
        return torch.cat(ops.residual_layer_norm(**named, **options), -1)

    return call, [draws.tensor(*(shape if name in NAMES[:2] else shape[-1:])) for name in names]


def _plain(ops: Any, *tensors: Tensor) -> Tensor:
    return ops.layer_norm(*tensors)


def _call(ops: Any, *tensors: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    named = dict(zip(NAMES, tensors, strict=True))
    return ops.residual_layer_norm(**named, dropout_p=dropout_p)


def _bare(ops: Any, residual: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    """A residual of higher precision than its addend; the sum is unused."""
    half = delta.bfloat16() if delta.dtype == torch.float32 else delta
    return ops.residual_layer_norm(residual, half, weight)[0]


def _shapes(*shape: int) -> list[tuple[int, ...]]:
    """Shapes of residual, delta, weight, bias and delta_bias."""
    return [shape] * 2 + [shape[-1:]] * 3


def _masks(n_rows: int, n_cols: int, device: str, **options: Any) -> Masks:
    zeros, ones = (f(n_rows, n_cols, device=device) for f in (torch.zeros, torch.ones))
    delta = ones.clone().requires_grad_()
    total = fused.residual_layer_norm(zeros, delta, ones[0], **options)[1]
    return total > 0, torch.autograd.grad(total, delta, ones)[0] > 0


def _compare(dtype: torch.dtype, columns: int, *without: str, **options: Any) -> None:
    plain = reference.residual_layer_norm
    _assert_parity((5, columns), dtype, "cpu", "contiguous", without, plain, **options)


_DROPS: dict[str, Any] = dict(dropout_p=0.2, seed=torch.tensor([0x1234_5678_9ABC_DEF]))
_WIDE = (3, 8200), (8200,)
LAYER_NORM = Cases(
    "layer_norm",
    valid=dict(x=ones(2, 8), weight=ones(8), bias=ones(8)),
    refused={
        r"weight must have shape \(8,\) .* x \(2, 8\), got \(7,\)": dict(weight=ones(7)),
        r"bias must have shape \(8,\).*got \(1, 8\)": dict(bias=ones(1, 8)),
        "bias must have the dtype of weight": dict(x=ones(2, 8).half(), bias=ones(8).half()),
        "eps must be at least 0, got -1.0": dict(eps=-1.0),
        "x must have a last dimension of at least 1": dict(x=ones(3, 0)),
    },
    compiled=[
        compiled("layer_norm-float32", compare, _plain, torch.float32, (37, 65), (65,), (65,)),
        compiled("layer_norm-float16-wide", compare, _plain, torch.float16, *_WIDE),
        compiled("layer_norm-bfloat16-wide", compare, _plain, torch.bfloat16, *_WIDE, (8200,)),
    ],
    calls={
        "": Call(
            [(2, 5, 33), (33,), (33,)],
            _plain,
            empty=[[(0, 33), (33,), (33,)], [(2, 0, 33), (33,), (33,)]],
            single=[(1, 1), (1,), (1,)],
            several=(torch.float32, [(70, 96), (96,), (96,)]),
        )
    },
    drawn=_plain_drawn,
)
RESIDUAL = Cases(
    "residual_layer_norm",
    valid=dict(
        residual=ones(2, 8), delta=ones(2, 8), weight=ones(8), bias=ones(8), delta_bias=ones(8)
    ),
    refused={
        r"delta must have shape \(2, 8\) to go with residual \(2, 8\), got": dict(delta=ones(1, 8)),
        r"weight must have shape \(8,\).*delta \(2, 8\), got \(7,\)": dict(weight=ones(7)),
        r"delta_bias must have shape \(8,\)": dict(delta_bias=ones(1, 8)),
        "eps must be at least 0, got -1": dict(eps=-1),
        r"dropout_p must lie in \[0, 0.999\], got 1.0": dict(dropout_p=1.0),
        "seed must be an int64 tensor": dict(dropout_p=0.1, seed=ones(1)),
        r"dropout_offset must lie in \[0, 2\^31\), got -1": dict(dropout_offset=-1),
    },
    compiled=[
        compiled("residual-float32-wide", _compare, torch.float32, 8200, **_DROPS),
        compiled("residual-float16", _compare, torch.float16, 72, *NAMES[3:]),
        compiled("residual-bfloat16", _compare, torch.bfloat16, 65, "bias", **_DROPS),
    ],
    calls={
        "": Call(
            _shapes(2, 5, 33),
            partial(_call, dropout_p=0.0),
            empty=[_shapes(0, 33)],
            single=_shapes(1, 1),
            several=(torch.float32, _shapes(9, 8200)),
        ),
        "dropout": Call(
            _shapes(2, 5, 33),
            partial(_call, dropout_p=0.5),
            empty=[_shapes(0, 33)],
            several=(torch.float32, _shapes(70, 96)),
        ),
    },
    variants={"bare": Call([(2, 5, 33)] * 2 + [(33,)], _bare)},
    drawn=_drawn,
    masks=_masks,
    needed=1,
)
