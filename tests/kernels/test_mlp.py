"""The MLP as one operator, GELU in the epilogues of its products, against the plain ops: parity
with both ways of loading tiles, saved tensors, frozen parameters.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, ones
from torch.utils.flop_counter import FlopCounterMode

from fastgpt.kernels import configs, costs, fused, gemm, reference, torch_ops
from fastgpt.kernels.configs import CUBLAS
from fastgpt.kernels.mlp import _mlp_op
from tests.kernels.test_linear import loads  # noqa: F401
from tests.tools import parity
from tests.tools.calls import Call, Cases, compiled
from tests.tools.draws import Drawn, Draws

# (shape of x, hidden width, outputs): not multiples of a tile; rows that TMA cannot copy; empty.
SHAPES = [
    ((1, 16), 64, 16),
    ((130, 40), 136, 24),
    ((2, 33, 72), 288, 72),
    ((65, 64), 72, 200),
    ((9, 25), 31, 7),
    ((2, 3, 16), 20, 16),
    ((0, 16), 64, 16),
]
NAMES = ["x", "fc_weight", "fc_bias", "proj_weight"]
TILES = [(16, 32, 16, 4, 1, 1), (32, 64, 32, 4, 1, 3)]


def _inputs(
    shape: tuple[int, ...], hidden: int, n: int, dtype: torch.dtype, device: str, layout: str
) -> list[Tensor]:
    width = shape[-1]
    return [
        parity.randn(shape, dtype, device, layout),
        parity.randn((hidden, width), dtype, device, layout) * width**-0.5,
        parity.randn((hidden,), dtype, device, "strided"),
        parity.randn((n, hidden), dtype, device, layout) * hidden**-0.5,
    ]


def _assert_parity(
    inputs: list[Tensor], n: int, layout: str, form: str, bias: bool, **options: Any
) -> None:
    """``options`` are passed to the kernel only."""

    def of(module, **options):
        def run(x, fc_weight, *rest):
            fc_bias, proj_weight = rest if bias else (None, *rest)
            return module.mlp(x, fc_weight, fc_bias, proj_weight, approximate=form, **options)

        return run

    inputs, names = list(inputs), list(NAMES)
    if not bias:
        del inputs[2], names[2]
    x = inputs[0]
    grad = parity.randn((*x.shape[:-1], n), x.dtype, x.device.type, layout)
    ops = of(fused, **options), of(torch_ops), of(reference)
    parity.assert_parity(*ops, inputs, grad, names)


@pytest.mark.parametrize("shape,hidden,n", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_parity(
    device: str,
    shape: tuple[int, ...],
    hidden: int,
    n: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The two ways to load a tile alternate."""
    i = SHAPES.index((shape, hidden, n))
    if (i + parity.DTYPES.index(dtype)) % 2:
        monkeypatch.setattr(gemm, "_tma", lambda device: False)
    layout = parity.LAYOUTS[i % len(parity.LAYOUTS)]
    inputs = _inputs(shape, hidden, n, dtype, device, layout)
    _assert_parity(inputs, n, "transposed", ["none", "tanh"][i // 2 % 2], bias=i % 3 != 0)


@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.usefixtures("loads")
def test_any_tile(device: str, monkeypatch: pytest.MonkeyPatch, tile: tuple, form: str) -> None:
    """Several tiles per program, and tile groups that are only partly filled."""
    if device == "cuda":
        pytest.skip("the GPU's tables are its own")
    monkeypatch.setattr(gemm, "_config", lambda *asked, **options: configs.Gemm(*tile))
    inputs = _inputs((85, 40), 104, 24, torch.float32, device, "contiguous")
    _assert_parity(inputs, 24, "contiguous", form, bias=True)


def _tables_say(monkeypatch: pytest.MonkeyPatch, product: configs.Gemm | str | None) -> None:
    """Let the tables choose ``product``; None: a tile, sm_100's where sm_90's table has cuBLAS."""
    lookup = configs.lookup

    def said(op: str, kernel: str, capability: int | None, *rest: Any) -> Any:
        config = lookup(op, kernel, capability, *rest)
        if product is None and config == CUBLAS and capability == 90:
            return lookup(op, kernel, 100, *rest)
        by_product = op == "gemm" and kernel in ("fwd", "bwd", "weight")
        return product if product is not None and by_product else config

    monkeypatch.setattr(configs, "lookup", said)


@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_tables_that_say_cublas(
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    form: str,
) -> None:
    """No Triton GEMM is launched; results have parity and are close to the Triton GEMMs'."""
    inputs = _inputs((137, 48), 104, 24, dtype, device, "contiguous")
    x, fc_weight, fc_bias, proj_weight = inputs
    dy = parity.randn((137, 24), dtype, device, "contiguous")
    pre = parity.randn((137, 104), dtype, device, "contiguous")

    def products() -> list[Tensor | None]:
        return [
            *gemm.linear_gelu(x, fc_weight, fc_bias, form),
            *gemm.linear_gelu(x, fc_weight, None, form),
            *gemm.linear_gelu_gradient(dy, proj_weight, pre, form, recompute=False),
            *gemm.linear_gelu_gradient(
                dy, proj_weight, pre, form, recompute=True, dbias_dtype=torch.float32
            ),
            *gemm.weight_gradient(dy, x, True, torch.float32),
            *gemm.weight_gradient(dy, x, False, dtype),
        ]

    with_kernels = products()
    _tables_say(monkeypatch, CUBLAS)
    monkeypatch.setattr(gemm, "_linear_gelu_kernel", None)  # a launch would raise TypeError
    monkeypatch.setattr(gemm, "_weight_grad_kernel", None)
    for ours, theirs in zip(with_kernels, products(), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.dtype == theirs.dtype
            tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)  # rounded once or twice
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    _assert_parity(inputs, 24, "contiguous", form, bias=True)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_costs_when_the_tables_say_cublas(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    """The same FLOPs; more bytes, for the passes that an epilogue saves."""
    t, c, f = 512, 64, 256
    x, hidden, fc_weight, fc_bias, proj_weight = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        for shape in ((t, c), (t, f), (f, c), (f,), (c, f))
    )
    dfc_weight, dfc_bias = (torch.empty(*s, device="meta") for s in ((f, c), (f,)))

    def totals() -> list[tuple[int, int]]:
        kernels = (
            costs._linear_gelu(x, fc_weight, fc_bias, hidden),
            costs._linear_gelu_gradient(x, proj_weight, hidden, recompute, dfc_bias),
            costs._weight_gradient(hidden, x, dfc_weight, dfc_bias),
        )
        return [(sum(k.flops for k in of), sum(k.bytes for k in of)) for of in kernels]

    monkeypatch.setattr(gemm, "splits", lambda *args: 1)
    _tables_say(monkeypatch, configs.Gemm(128, 128, 64, 4, 3, 2))
    fused = totals()
    _tables_say(monkeypatch, CUBLAS)
    separate = totals()
    flops = 2 * t * c * f
    assert [count for count, _ in fused] == [count for count, _ in separate] == [flops] * 3
    activation = 2 * t * f
    saved = [theirs - ours for (_, ours), (_, theirs) in zip(fused, separate, strict=True)]
    # GELU reads pre; GELU' reads dact, which was written before. The bias gradient reads dpre
    # again, in parts (written and read) of 64 rows instead of 128.
    parts = 2 * (t // 64 - t // 128) * 4 * f
    assert saved == [activation, 2 * activation + parts, activation]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_and_small_pre_activations(device: str, dtype: torch.dtype) -> None:
    """GELU and its derivative in the epilogues over the dtype's whole range."""
    values = torch.cat([torch.logspace(-7, 3.5, 64), torch.linspace(-6, 6, 64)]).to(dtype)
    fc_weight = torch.cat([values, -values]).view(-1, 1).expand(-1, 16).contiguous().to(device)
    x = torch.zeros(8, 16, dtype=dtype, device=device)
    x[:, 0] = 1.0
    proj_weight = torch.eye(256, dtype=dtype, device=device)
    grad = torch.ones(8, 256, dtype=dtype, device=device)

    def of(module):
        return lambda x, w: module.mlp(x, w, None, proj_weight.to(w.dtype))

    ops = of(fused), of(torch_ops), of(reference)
    parity.assert_parity(*ops, [x, fc_weight], grad, ["x", "fc_weight"])


def test_nothing_is_kept_without_gradients() -> None:
    inputs = _inputs((9, 16), 64, 16, torch.float32, "cpu", "contiguous")
    with torch.no_grad():
        leaves = [x.requires_grad_() for x in inputs]
        assert fused.mlp(*leaves).grad_fn is None
        assert len(_mlp_op(*leaves, None, None, None, 0.0, "none", False)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device: str, dtype: torch.dtype) -> None:
    inputs = _inputs((9, 16), 64, 16, torch.float32, device, "contiguous")
    leaves = [x.requires_grad_() for x in inputs]
    with torch.autocast(device, dtype):
        y = fused.mlp(*leaves)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves)
    assert torch.equal(y, fused.mlp(inputs[0].detach().to(dtype), *inputs[1:]))


def test_flops() -> None:
    leaves = [
        x.requires_grad_() for x in _inputs((30, 16), 64, 24, torch.float32, "cpu", "contiguous")
    ]
    with FlopCounterMode(display=False) as counter:
        fused.mlp(*leaves).sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 30 * 16 * 64 + 2 * 30 * 64 * 24)


# --------------------------------------------------------------------- the checks of every op


def _of_norm(ops: Any, x: Tensor, norm: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
    y = ops.layer_norm(x, norm, norm, 1e-3)
    return ops.mlp(y, fc, None, proj, recompute=(x, norm, norm, 1e-3))


def _tanh(ops: Any, x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
    return ops.mlp(x, fc, None, proj, approximate="tanh")


def _drawn(draws: Draws) -> Drawn:
    k, hidden, n = draws.size(24), draws.size(40), draws.size(24)
    approximate = draws.one_of("none", "tanh")
    inputs = [draws.tensor(*draws.outer(), k), draws.tensor(hidden, k), draws.tensor(n, hidden)]

    def call(ops: Any, x: Tensor, fc: Tensor, proj: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.mlp(x, fc, bias, proj, approximate=approximate)

    return call, inputs + draws.maybe(hidden)


def _compare(
    dtype: torch.dtype,
    rows: int,
    bias: bool,
    form: str,
    recompute: bool = False,
    product: str | None = None,
) -> None:
    inputs, options = _inputs((rows, 72), 136, 72, dtype, "cpu", "contiguous"), {}
    if recompute:
        source, weight = torch.randn(rows, 72).to(dtype), torch.randn(72).to(dtype)
        inputs[0] = fused.layer_norm(source, weight).detach()
        options = dict(recompute=(source, weight, None, 1e-5))
    with pytest.MonkeyPatch.context() as patch:
        _tables_say(patch, product)
        _assert_parity(inputs, 72, "contiguous", form, bias, **options)


MLP = Cases(
    "mlp",
    valid=dict(x=ones(2, 16), fc_weight=ones(64, 16), fc_bias=ones(64), proj_weight=ones(16, 64)),
    refused={
        r"fc_weight must have shape \(N, K\) to go with x": dict(fc_weight=ones(16, 64)),
        r"fc_bias must have shape \(64,\) to go with fc_weight": dict(fc_bias=ones(3)),
        r"proj_weight must have shape \(N, 64\)": dict(proj_weight=ones(64, 16)),
        "approximate must be 'none' or 'tanh', got 'erf'": dict(approximate="erf"),
        "recompute must begin with a tensor of x's shape": dict(
            recompute=(ones(1, 16), ones(16), None, 1e-5)
        ),
    },
    compiled=[
        compiled("mlp-float16", _compare, torch.float16, 140, True, "none"),
        compiled("mlp-bfloat16-recompute", _compare, torch.bfloat16, 70, False, "tanh", True),
        compiled("mlp-float32", _compare, torch.float32, 40, True, "none"),
        compiled(
            "mlp-float16-library", _compare, torch.float16, 140, False, "tanh", product=CUBLAS
        ),
        compiled("mlp-bfloat16-library", _compare, torch.bfloat16, 70, True, "none", True, CUBLAS),
    ],
    calls={
        "": Call(
            [(2, 7, 20), (24, 20), (24,), (16, 24)],
            lambda ops, *tensors: ops.mlp(*tensors),
            empty=[
                [(0, 2, 20), (24, 20), (24,), (16, 24)],
                [(3, 0), (24, 0), (24,), (16, 24)],
                [(3, 20), (0, 20), (0,), (16, 0)],
                [(3, 20), (24, 20), (24,), (0, 24)],
                [(0,), (0, 0), (0,), (0, 0)],
            ],
            single=[(1, 16), (1, 16), (1,), (1, 1)],
            several=(torch.bfloat16, [(130, 64), (256, 64), (256,), (64, 256)]),
        ),
        "recompute": Call(
            [(7, 20), (20,), (24, 20), (16, 24)],
            _of_norm,
            empty=[
                [(0, 20), (20,), (24, 20), (16, 24)],
                [(3, 20), (20,), (0, 20), (16, 0)],
                [(3, 20), (20,), (24, 20), (0, 24)],
            ],
            single=[(1, 16), (16,), (16, 16), (1, 16)],
        ),
    },
    variants={"tanh": Call([(7, 20), (24, 20), (16, 24)], _tanh)},
    drawn=_drawn,
)
