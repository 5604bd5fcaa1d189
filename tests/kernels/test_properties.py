"""Every op on inputs that hypothesis draws: shapes, strides, dtypes and options, by the rule of
``parity`` for few numbers against the plain op. 30 cases an op, always the same; others, and more:

    pytest --hypothesis-profile=large tests/kernels/test_properties.py

On the CPU, where kernels are interpreted: a GPU would compile one for nearly every case.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.kernels import fused, reference, torch_ops
from tests.kernels.test_adamw import Buffers
from tests.tools.calls import decoding
from tests.tools.parity import DTYPES, LAYOUTS, assert_parity, randn

hypothesis = pytest.importorskip("hypothesis", reason="needs the extra test")
st = pytest.importorskip("hypothesis.strategies", reason="needs the extra test")

Call = Callable[..., Tensor]  # of a module of ops and the inputs
Draw = Callable[[Any], Any]


class Case:
    """Tensors for a call, drawn."""

    def __init__(self, draw: Draw, drops: bool = False) -> None:
        self.draw, self._drops = draw, drops
        self.dtype = draw(st.sampled_from(DTYPES))
        torch.manual_seed(draw(st.integers(0, 1 << 30)))

    def size(self, most: int) -> int:
        size: int = self.draw(st.integers(1, most))
        return size

    def width(self, most: int) -> int:
        """Of what LayerNorm normalises. Fewer numbers can be nearly equal, and dividing by their
        deviation makes any rounding large, PyTorch's as ours."""
        return 7 + self.size(most)

    def flag(self) -> bool:
        flag: bool = self.draw(st.booleans())
        return flag

    def tensor(self, *shape: int) -> Tensor:
        return randn(shape, self.dtype, "cpu", self.draw(st.sampled_from(LAYOUTS)))

    def gradient(self, shape: Sequence[int]) -> Tensor:
        return self.tensor(*shape) if len(shape) else self.tensor(1)[0]

    def maybe(self, *shape: int) -> list[Tensor]:
        return [self.tensor(*shape)] if self.flag() else []

    def outer(self) -> list[int]:
        """Dimensions in front of the last, if any."""
        sizes: list[int] = self.draw(st.lists(st.integers(0, 5), max_size=3))
        return sizes

    def integers(self, high: int, *shape: int) -> Tensor:
        dtype = self.draw(st.sampled_from([torch.int64, torch.int32]))
        return torch.randint(high, shape, dtype=dtype)

    def dropout(self) -> dict[str, Any]:
        if not (self._drops and self.flag()):
            return {}
        return dict(
            dropout_p=self.draw(st.sampled_from([0.1, 0.5, 0.9])),
            seed=torch.randint(1 << 62, (1,)),
            dropout_offset=self.draw(st.integers(0, 9)),
        )

    def doc_start(self, batch: int, length: int) -> Tensor:
        begins = torch.rand(batch, length) < 0.2
        places = torch.arange(length).expand(batch, -1)
        return torch.where(begins, places, 0).cummax(1).values.int()


Made = tuple[Call, Sequence[Tensor]]


def _gelu(case: Case) -> Made:
    approximate = case.draw(st.sampled_from(["none", "tanh"]))
    x = case.tensor(*case.outer(), case.size(70))
    return lambda ops, x: ops.gelu(x, approximate), [x]


def _layer_norm(case: Case) -> Made:
    width, eps = case.width(130), case.draw(st.sampled_from([1e-5, 1e-3]))
    inputs = [case.tensor(*case.outer(), width), case.tensor(width), *case.maybe(width)]
    return lambda ops, x, weight, bias=None: ops.layer_norm(x, weight, bias, eps), inputs


def _residual_layer_norm(case: Case) -> Made:
    shape = [*case.outer(), case.width(70)]
    bias, delta_bias = case.flag(), case.flag()
    inputs = [case.tensor(*shape), case.tensor(*shape), case.tensor(shape[-1])]
    inputs += [case.tensor(shape[-1]) for _ in range(bias + delta_bias)]
    options = case.dropout()

    def call(ops: Any, residual: Tensor, delta: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
        left = iter(more)
        norm, total = ops.residual_layer_norm(
            residual,
            delta,
            weight,
            next(left) if bias else None,
            delta_bias=next(left) if delta_bias else None,
            **options,
        )
        return torch.cat((norm, total), -1)

    return call, inputs


def _linear(case: Case) -> Made:
    k, n = case.size(40), case.size(40)
    inputs = [case.tensor(*case.outer(), k), case.tensor(n, k), *case.maybe(n)]
    return lambda ops, *tensors: ops.linear(*tensors), inputs


def _mlp(case: Case) -> Made:
    k, hidden, n = case.size(24), case.size(40), case.size(24)
    approximate = case.draw(st.sampled_from(["none", "tanh"]))
    inputs = [case.tensor(*case.outer(), k), case.tensor(hidden, k), case.tensor(n, hidden)]
    inputs += case.maybe(hidden)

    def call(ops: Any, x: Tensor, fc: Tensor, proj: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = ops.mlp(x, fc, bias, proj, approximate=approximate)
        return out

    return call, inputs


def _attention_options(case: Case, batch: int, length: int | None) -> dict[str, Any]:
    """``length``: of queries and keys, if that is one."""
    options = case.dropout() | {"causal": case.flag()}
    if case.flag():
        options["scale"] = case.draw(st.sampled_from([0.1, 1.0]))
    if options["causal"] and length is not None and case.flag():
        options["doc_start"] = case.doc_start(batch, length)
    return options


def _attention(case: Case) -> Made:
    batch, heads, size, queries = case.size(2), case.size(2), case.size(16), case.size(20)
    keys = queries if case.flag() else case.size(20)
    options = _attention_options(case, batch, queries if keys == queries else None)
    if "doc_start" not in options and case.flag():
        options["key_lengths"] = torch.randint(keys + 1, (batch,), dtype=torch.int32)
    shapes = [(batch, heads * case.size(3), queries, size), *[(batch, heads, keys, size)] * 2]
    return lambda ops, *qkv: ops.attention(*qkv, **options), [case.tensor(*s) for s in shapes]


def _attention_qkvpacked(case: Case) -> Made:
    batch, heads, size, length = case.size(2), case.size(2), case.size(16), case.size(20)
    options = _attention_options(case, batch, length)
    qkv = case.tensor(batch, length, 3 * heads * size)
    return lambda ops, qkv: ops.attention_qkvpacked(qkv, heads, **options), [qkv]


def _attention_decode(case: Case) -> Made:
    """The cache, which it changes, is a part of the result."""
    batch, heads, size, slots = case.size(3), case.size(3), case.size(20), case.size(40)
    positions = torch.randint(slots, (batch,))
    cache = randn((2, batch, heads, slots, size), case.dtype, "cpu", "contiguous")
    return decoding(cache, positions), [case.tensor(batch, 1, 3 * heads * size)]


def _embedding(case: Case) -> Made:
    batch, length, vocab, width = case.size(3), case.size(9), case.size(20), case.size(70)
    idx, options = case.integers(vocab, batch, length), case.dropout()
    if case.flag():
        options["doc_start"] = case.doc_start(batch, length)
    inputs = [case.tensor(vocab, width), case.tensor(length + case.size(3) - 1, width)]
    return lambda ops, *tables: ops.embedding(idx, *tables, **options), inputs


def _linear_cross_entropy(case: Case) -> Made:
    shape, k, vocab = case.outer(), case.size(40), 1 + case.size(40)
    targets = case.integers(vocab, *shape)
    options = dict(
        ignore_index=case.draw(st.sampled_from([-1, 0])),
        reduction=case.draw(st.sampled_from(["mean", "sum"])),
        label_smoothing=case.draw(st.sampled_from([0.0, 0.1])),
        z_loss=case.draw(st.sampled_from([0.0, 1e-3])),
    )
    hypothesis.assume(bool((targets != options["ignore_index"]).any()))  # else the mean is NaN
    inputs = [case.tensor(*shape, k), case.tensor(vocab, k)]
    return lambda ops, x, w: ops.linear_cross_entropy(x, w, targets, **options), inputs


OPS: dict[str, Callable[[Case], Made]] = {
    "attention": _attention,
    "attention_decode": _attention_decode,
    "attention_qkvpacked": _attention_qkvpacked,
    "embedding": _embedding,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "mlp": _mlp,
    "residual_layer_norm": _residual_layer_norm,
}


def test_every_op_has_a_property() -> None:
    assert {*OPS, "adamw"} == set(reference.OPS)


both = pytest.mark.parametrize("ops", [fused, torch_ops], ids=["fused", "torch_ops"])


@both
@pytest.mark.parametrize("name", OPS)
@hypothesis.given(data=st.data())
def test_parity(data: Any, name: str, ops: Any) -> None:
    case = Case(data.draw, drops=ops is fused)  # PyTorch's masks are PyTorch's own
    call, inputs = OPS[name](case)
    plain = partial(call, reference)
    shape = plain(*(x.double() for x in inputs)).shape
    names = [f"input {i}" for i in range(len(inputs))] if name != "attention_decode" else []
    assert_parity(partial(call, ops), plain, plain, inputs, case.gradient(shape), names, few=True)


@both
@hypothesis.given(data=st.data())
def test_adamw(data: Any, ops: Any) -> None:
    """Some updates, against PyTorch's optimizer."""
    case = Case(data.draw)
    start = randn([case.size(2000)], torch.float32, "cpu", "contiguous")
    rounded = data.draw(st.sampled_from([None, torch.float16, torch.bfloat16]))
    betas = data.draw(st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.0, 0.5)]))
    options = dict(
        betas=betas,
        eps=data.draw(st.sampled_from([1e-8, 1e-3])),
        weight_decay=data.draw(st.sampled_from([0.0, 0.1])),
    )
    lr, clip = data.draw(st.sampled_from([1e-4, 1e-2])), data.draw(st.sampled_from([None, 0.3]))
    ours = Buffers(start, rounded)
    params = [start.clone(), start.double()]
    theirs = [torch.optim.AdamW([p], lr=lr, **options) for p in params]
    for _ in range(case.size(4)):
        grad = randn(start.shape, torch.float32, "cpu", "contiguous")
        factor = None if clip is None else torch.tensor(clip)
        skipped = case.flag()
        ours.update(ops, grad, lr, **options, clip=factor, skip=torch.tensor(float(skipped)))
        for param, optimizer in zip(params, theirs, strict=True):
            param.grad = (grad if clip is None else grad * clip).to(param.dtype)
            if not skipped:
                optimizer.step()
    common, exact = params
    error = (ours.param.double() - exact).abs().max()
    assert error <= 2 * (common.double() - exact).abs().max() + 1e-6
    if ours.rounded is not None and ours.step.item():
        assert torch.equal(ours.rounded, ours.param.to(ours.rounded.dtype))
