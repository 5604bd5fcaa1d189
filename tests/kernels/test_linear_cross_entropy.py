"""Chunked linear + cross-entropy in Triton and in torch_ops: parity with full logits, gradients of
any subset of inputs, precision, determinism, operators, costs, saved tensors.
"""

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, ones
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from fastgpt.kernels import chunked_loss, fused, linear_cross_entropy, reference, torch_ops
from fastgpt.kernels.costs import COSTS
from tests.tools import parity
from tests.tools.calls import Call, Cases, compare, compiled, ids
from tests.tools.draws import Drawn, Draws

CHUNK = 8
# Leading dimensions of x, C, V: one token, one class, V below and above a tile and odd, rows for
# less than a chunk, one chunk and several.
SHAPES = [
    ((1,), 8, 65),
    ((5,), 3, 1),
    ((8,), 25, 257),
    ((2, 17), 24, 1000),
    ((3, 1, 5), 16, 65),
    ((9,), 16, 4097),
    ((40,), 7, 33),
]
OPTIONS: list[dict[str, Any]] = [
    dict(reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss)
    for reduction in ("mean", "sum")
    for label_smoothing, z_loss in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.3, 0.02))
]
NAMES = ["x", "weight"]

Pair = tuple[Tensor, Tensor]  # x and weight


SCALE_OPS = {fused: linear_cross_entropy._scale_op, torch_ops: chunked_loss._scale_op}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "chunk_rows", lambda n_cols, dtype, device: CHUNK)


def inputs(
    shape: tuple[int, ...],
    width: int,
    n_classes: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> tuple[Pair, Tensor]:
    """x and weight for logits of N(0, 2^2); every third target is ignored."""
    x = parity.randn((*shape, width), dtype, device, layout)
    weight = parity.randn((n_classes, width), dtype, device, layout) * (2 / width**0.5)
    targets = torch.randint(n_classes, shape, device=device)
    targets.view(-1)[1::3] = -1
    return (x, weight), targets


def as_leaves(tensors: Pair) -> Pair:
    return tensors[0].requires_grad_(), tensors[1].requires_grad_()


def whole(
    x: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, **options: Any
) -> Tensor:
    """The usual PyTorch code: products in the inputs' dtype, the rest in float32."""
    logits = F.linear(x, weight).flatten(0, -2).float()
    targets = targets.flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=-1, **options)
    if z_loss > 0.0:
        kept = logits[targets != -1].logsumexp(-1).square()
        loss = loss + z_loss * (kept.sum() if options["reduction"] == "sum" else kept.mean())
    return loss


def assert_parity(ops: ModuleType, tensors: Pair, targets: Tensor, **options: Any) -> None:
    kernel, plain = (
        partial(module.linear_cross_entropy, targets=targets, **options)
        for module in (ops, reference)
    )
    pytorch = partial(whole, targets=targets, **options)
    # A power of two adds no rounding. With a single token there is one rounded gradient per class,
    # so it would be luck whether 1.7 times it rounds as well as PyTorch's.
    grad = torch.tensor(2.0, device=targets.device)
    parity.assert_parity(kernel, pytorch, plain, tensors, grad, NAMES)


def gradients(loss: Tensor, *leaves: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_parity(ops, device: str, shape: Any, dtype: torch.dtype) -> None:
    """All options, each in at least two dtypes."""
    i, (rows, width, n_classes) = SHAPES.index(shape), shape
    layout = parity.LAYOUTS[i % len(parity.LAYOUTS)]
    tensors, targets = inputs(rows, width, n_classes, device, dtype, layout)
    options = OPTIONS[(i + 3 * parity.DTYPES.index(dtype)) % len(OPTIONS)]
    assert_parity(ops, tensors, targets, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(ops, options: dict[str, Any]) -> None:
    tensors, targets = inputs((11,), 3, 7, "cpu", torch.float64)
    leaves = as_leaves(tensors)
    op = partial(ops.linear_cross_entropy, targets=targets, **options)
    assert torch.autograd.gradcheck(op, leaves, **parity.GRADCHECK)


def test_chunks_change_nothing(ops, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, targets = inputs((29,), 16, 130, device)
    leaves = as_leaves(tensors)
    results = []
    for rows in (1, 7, 29, 4096):
        monkeypatch.setattr(chunked_loss, "chunk_rows", lambda *_, rows=rows: rows)
        loss = ops.linear_cross_entropy(*leaves, targets)
        results.append((loss, *gradients(loss, *leaves)))
    for result in results[1:]:
        for value, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)


def test_incoming_gradient_and_second_backward(ops, device: str) -> None:
    """A loss scaled as by GradScaler; a second backward pass gives the same gradients."""
    tensors, targets = inputs((19,), 16, 65, device, torch.float16)
    leaves = as_leaves(tensors)
    loss = ops.linear_cross_entropy(*leaves, targets)
    once = gradients(loss, *leaves, retain_graph=True)
    scaled = gradients(1024.0 * loss, *leaves, retain_graph=True)
    for small, large in zip(once, scaled, strict=True):
        torch.testing.assert_close(large / 1024.0, small, atol=1e-7, rtol=1e-3)
    assert all(map(torch.equal, once, gradients(loss, *leaves)))


def test_float16_gradients_do_not_underflow(ops, device: str) -> None:
    """With a scaled loss, the factor 1 / rows must not underflow gradients in float16."""
    rows, classes = 40, 500
    tensors, targets = inputs((rows,), 16, classes, device, torch.float16)
    tensors[1].mul_(1e-3)  # p is about 1 / 500, divided by the rows 5e-5
    leaves = as_leaves(tensors)
    loss = ops.linear_cross_entropy(*leaves, targets) * 2.0**14
    exact = as_leaves((tensors[0].detach().double(), tensors[1].detach().double()))
    expected = gradients(reference.linear_cross_entropy(*exact, targets) * 2.0**14, *exact)
    for value, truth in zip(gradients(loss, *leaves), expected, strict=True):
        assert (value - truth).norm() <= 2e-3 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_mean_divides_in_float32(ops, device: str, dtype: torch.dtype) -> None:
    """n / n is exactly 1; n times the rounded 1 / n often is not."""
    scale = SCALE_OPS[ops]
    one, nothing = torch.ones((), device=device), torch.empty(0, device=device)
    for n in range(1, 257, 5):
        dx = torch.full((3,), float(n), dtype=dtype, device=device)
        scaled, _ = scale(one, n * one, dx, nothing, dtype, torch.float32)
        assert torch.equal(scaled, torch.ones_like(scaled))


@pytest.mark.parametrize(
    ("with_x", "with_weight", "enabled"),
    [*itertools.product([False, True], [False, True], [True]), (True, True, False)],
)
def test_only_what_is_asked_for(
    ops,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    with_x: bool,
    with_weight: bool,
    enabled: bool,
) -> None:
    """With frozen tensors or no_grad: the same loss, and no products for unused gradients."""
    (x, weight), targets = inputs((2 * CHUNK,), 16, 65, device)
    leaves = as_leaves((x.clone(), weight.clone()))
    loss = ops.linear_cross_entropy(*leaves, targets)
    expected = gradients(loss, *leaves)
    products = []

    def counted(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            products.append(product)
            return product(*args, **kwargs)

        return call

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, counted(getattr(torch, name)))
    x.requires_grad_(with_x)
    weight.requires_grad_(with_weight)
    with nullcontext() if enabled else torch.no_grad():
        again = ops.linear_cross_entropy(x, weight, targets)
    asked = [(x, with_x, expected[0]), (weight, with_weight, expected[1])]
    assert torch.equal(again, loss)
    assert len(products) == 2 * (1 + (enabled and with_x) + (enabled and with_weight))
    assert again.requires_grad == (enabled and (with_x or with_weight))
    if again.requires_grad:
        again.backward()
        for leaf, wanted, gradient in asked:
            assert (leaf.grad is not None) == wanted
            assert leaf.grad is None or torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast(ops, device: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    """Products in autocast's dtype, loss in float32, gradients in the dtypes of x and weight."""
    tensors, targets = inputs((19,), 16, 257, device)

    def within(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast(device, dtype):
                return op(x.to(x_dtype), weight, targets)

        return run

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return reference.linear_cross_entropy(x, weight, targets)

    grad = torch.tensor(1.0, device=device)
    parity.assert_parity(
        within(ops.linear_cross_entropy), within(whole), plain, tensors, grad, NAMES
    )
    x, weight = tensors[0].to(x_dtype).requires_grad_(), tensors[1].requires_grad_()
    with torch.autocast(device, dtype):
        loss = ops.linear_cross_entropy(x, weight, targets)
    dtypes = [tensor.dtype for tensor in (loss, *gradients(loss, x, weight))]
    assert dtypes == [torch.float32, x_dtype, torch.float32]


def test_float32_weight_with_low_precision_input(ops, device: str) -> None:
    """weight is rounded to x's dtype for the products; its gradient is summed in float32."""
    (x, weight), targets = inputs((40,), 16, 65, device)
    x, weight = x.bfloat16(), weight.requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, targets)
    rounded = weight.detach().bfloat16()
    low, high = (rounded.to(d).requires_grad_() for d in (torch.bfloat16, torch.float64))
    expected = whole(x, low, targets)
    truth = reference.linear_cross_entropy(x.double(), high, targets)
    (dweight,), (common,), (exact,) = (
        gradients(a, b) for a, b in ((loss, weight), (expected, low), (truth, high))
    )
    assert dweight.dtype == torch.float32
    assert (dweight - exact).norm() <= (common - exact).norm()
    assert (loss - truth).abs() <= 2 * (expected - truth).abs() + 1e-5


def test_compiled_whole_with_few_recompilations(ops, device: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    op = partial(ops.linear_cross_entropy, z_loss=1e-4)
    compiled = torch.compile(op, fullgraph=True, backend=counter)
    for rows in (16, 7, 12, 40, 9, 3, 33, 15, 24, 8, 31, 5, 64, 2, 17, 11, 26, 48, 1, 13):
        tensors, targets = inputs((rows,), 16, 65, device)
        targets[0] = 0  # at least one is not ignored
        leaves = as_leaves(tensors)
        losses = [call(*leaves, targets) for call in (op, compiled)]
        results = [(loss, *gradients(loss, *leaves)) for loss in losses]
        assert all(map(torch.equal, *results))
    assert counter.frame_count <= 3  # the first graph and two more
    with torch.no_grad():
        assert torch.equal(compiled(*leaves, targets), losses[0])


@pytest.mark.parametrize("x_needs_gradient", [False, True])
def test_flops(ops, device: str, x_needs_gradient: bool) -> None:
    """2 M V C for each of the three products, independent of the chunk size."""
    (x, weight), targets = inputs((20,), 16, 65, device)
    product = 2 * 20 * 65 * 16
    with FlopCounterMode(display=False) as counter:
        loss = ops.linear_cross_entropy(
            x.requires_grad_(x_needs_gradient), weight.requires_grad_(), targets
        )
        loss.backward()
    assert counter.get_total_flops() == (3 if x_needs_gradient else 2) * product
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ops.linear_cross_entropy(x, weight, targets)
    assert counter.get_total_flops() == product


def test_bytes_by_hand(ops, device: str) -> None:
    """Three chunks: products read their operands and write their result, the rows of logits are
    read and written, the dweight sum is written and, except at first, read; weight is cast."""
    (x, weight), targets = inputs((3 * CHUNK,), 16, 65, device)
    op = {fused: linear_cross_entropy, torch_ops: torch_ops}[ops]._linear_cross_entropy_op
    args = (x, weight, targets, torch.bfloat16, -1, True, 0.0, 0.0, True, True)
    costs = COSTS[f"fastgpt.{op._opname}"](op(*args), *args)
    rows, logits, weights = 2 * 24 * 16, 2 * 24 * 65, 2 * 65 * 16
    assert {cost.name: cost.bytes for cost in costs} == {
        "logits": rows + 3 * weights + logits,
        "rows": 2 * logits + 8 * 24,
        "dx": logits + 3 * weights + rows,
        "dweight": logits + rows + 5 * 4 * 65 * 16,
        "cast x": 3 * rows,
        "cast weight": 3 * weights,
    }


def test_kept_for_the_backward_pass(ops, device: str) -> None:
    """Two gradients and the divisor; nothing of the size of the logits."""
    (x, weight), targets = inputs((40,), 4, 500, device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: pytest.fail("unused")):
        ops.linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
    assert sorted(tensor.numel() for tensor in kept) == [1, x.numel(), weight.numel()]


# --------------------------------------------------------------------- the checks of every op


def _call(
    ops: Any, x: Tensor, weight: Tensor, targets: Tensor | None = None, **options: Any
) -> Tensor:
    targets = torch.arange(len(x), device=x.device) if targets is None else targets
    return ops.linear_cross_entropy(x, weight, targets, **options)


def _drawn(draws: Draws) -> Drawn:
    shape, k, vocab = draws.outer(), draws.size(40), 1 + draws.size(40)
    targets = draws.integers(vocab, *shape)
    options = dict(
        ignore_index=draws.one_of(-1, 0),
        reduction=draws.one_of("mean", "sum"),
        label_smoothing=draws.one_of(0.0, 0.1),
        z_loss=draws.one_of(0.0, 1e-3),
    )
    draws.assume(bool((targets != options["ignore_index"]).any()))  # else the mean is NaN
    call = partial(_call, targets=targets, **options)
    return call, [draws.tensor(*shape, k), draws.tensor(vocab, k)]


def _compare(dtype: torch.dtype, n_vocab: int, **options: Any) -> None:
    targets = torch.randint(n_vocab, (37,))
    targets[5] = -1
    compare(partial(_call, targets=targets, **options), dtype, (37, 32), (n_vocab, 32))


def _compare_without_gradient() -> None:
    x, weight, targets = torch.randn(37, 32), torch.randn(65, 32), torch.randint(65, (37,))
    got, exact = (module.linear_cross_entropy(x, weight, targets) for module in (fused, reference))
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=0.0)


LOSS = Cases(
    "linear_cross_entropy",
    valid=dict(x=ones(2, 3, 8), weight=ones(65, 8), targets=ids(2, 3)),
    refused={
        r"weight must have shape \(N, K\).*got \(65, 7\)": dict(weight=ones(65, 7)),
        "weight must have a row for each class": dict(weight=ones(0, 8)),
        r"targets must have shape \(2, 3\).*got \(6,\)": dict(targets=ids(6)),
        "'mean' or 'sum', got 'none'": dict(reduction="none"),
        r"both sizes of weight must be multiples of 16 .*, got \(65, 8\)": dict(fp8=True),
        r"z_loss must be 0 with fp8=True, got 0\.1": dict(
            x=ones(2, 3, 16), weight=ones(32, 16), z_loss=0.1, fp8=True
        ),
        **{
            rf"label_smoothing must lie in \[0, 1\], got {e}": dict(label_smoothing=e)
            for e in (-0.1, 1.1, math.nan)
        },
        **{
            f"z_loss must be at least 0 and finite, got {z}": dict(z_loss=z)
            for z in (-1e-4, math.inf, math.nan)
        },
    },
    compiled=[
        compiled("loss-float32-smoothed", _compare, torch.float32, 65, label_smoothing=0.1),
        compiled("loss-float16", _compare, torch.float16, 65, z_loss=1e-3),
        compiled("loss-bfloat16", _compare, torch.bfloat16, 8300),
        compiled("loss-without-gradient", _compare_without_gradient),
        compiled("fp8-float16-loss", _compare, torch.float16, 80, fp8=True, sm=(90,)),
        compiled("fp8-bfloat16-loss", _compare, torch.bfloat16, 80, fp8=True, sm=(90,)),
    ],
    calls={
        "": Call(
            [(5, 20), (17, 20)],
            _call,
            empty=[[(0, 20), (17, 20)], [(5, 0), (17, 0)], [(0, 0), (17, 0)]],
            single=[(1, 16), (1, 16)],
            several=(torch.bfloat16, [(30, 16), (300, 16)]),
        )
    },
    variants={
        "smoothed": Call(
            [(5, 20), (17, 20)],
            partial(_call, reduction="sum", label_smoothing=0.1, z_loss=0.01),
        )
    },
    drawn=_drawn,
)
