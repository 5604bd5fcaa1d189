"""Attention in Triton against masked matrix products: parity of outputs and gradients, operator
registration. See test_attention_semantics.py for mask and dropout semantics.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, ones

from fastgpt import GPT, GPTConfig
from fastgpt.kernels import _host, fused, reference, torch_ops
from fastgpt.kernels._attention import MAX_HEAD_SIZE
from tests.kernels.test_attention_semantics import assert_pipelined_pv_is_the_same
from tests.tools import interpreter, parity
from tests.tools.calls import Call, Cases, Masks, compare, compiled, ids, places, with_seed
from tests.tools.documents import starts_of
from tests.tools.draws import Drawn, Draws

LENGTHS = [1, 7, 17, 64, 127, 129]
HEAD_SIZES = [8, 25, 64, 80, 128]


def seed_on(device: str) -> Tensor:
    return torch.tensor([0x1234_5678_9ABC_DEF], device=device)


def assert_parity(name: str, inputs: list[Tensor], grad: Tensor, **options: Any) -> None:
    """Compare the kernel and the plain op in the inputs' dtype with the plain op in float64."""
    kernel, plain = (partial(getattr(module, name), **options) for module in (fused, reference))
    names = ["qkv"] if len(inputs) == 1 else ["q", "k", "v"]
    parity.assert_parity(kernel, plain, plain, inputs, grad, names)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("length", LENGTHS)
def test_parity_packed(device: str, length: int, head_size: int) -> None:
    """Dtypes alternate over the cases; test_parity_separate covers the other two."""
    case = LENGTHS.index(length) + HEAD_SIZES.index(head_size)
    dtype = parity.DTYPES[(case + 2) % 3]
    n_head, batch = 1 + case % 5, 1 + case % 2
    shape = (batch, length, 3 * n_head * head_size)
    qkv = parity.randn(shape, dtype, device, parity.LAYOUTS[case % 4])
    grad = parity.randn((batch, length, n_head * head_size), dtype, device, "transposed")
    assert_parity("attention_qkvpacked", [qkv], grad, n_head=n_head)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_as_accurate_as_sdpa(device: str, dtype: torch.dtype) -> None:
    """A sharper bound: PyTorch's flash kernel rounds less than the plain op in low precision."""
    qkv = torch.randn(2, 129, 3 * 128, device=device).to(dtype)
    grad = torch.randn(2, 129, 128, device=device).to(dtype)
    kernel, pytorch, plain = (
        partial(m.attention_qkvpacked, n_head=2) for m in (fused, torch_ops, reference)
    )
    with parity.skipped_without_sdpa():
        parity.assert_parity(kernel, pytorch, plain, [qkv], grad, ["qkv"])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("n_queries", LENGTHS)
def test_parity_separate(device: str, n_queries: int, head_size: int, causal: bool) -> None:
    """q, k, v of different lengths and layouts; dtypes, head counts and scales alternate."""
    case = LENGTHS.index(n_queries) + HEAD_SIZES.index(head_size) + causal
    n_keys = LENGTHS[1 + (LENGTHS.index(n_queries) + case) % 5]  # one key: see test_one_key
    dtype, n_head = parity.DTYPES[case % 3], 1 + case % 3
    q, k, v = (
        parity.randn((2, n_head, length, head_size), dtype, device, parity.LAYOUTS[(case + i) % 4])
        for i, length in enumerate((n_queries, n_keys, n_keys))
    )
    grad = parity.randn(q.shape, dtype, device, "strided")
    assert_parity("attention", [q, k, v], grad, causal=causal, scale=None if case % 2 else 0.3)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_one_key(device: str, dtype: torch.dtype, causal: bool) -> None:
    """The probability is 1, so the output is v and dv the sum of dout. dq and dk are 0 up to the
    rounding of dP - delta, two float32 sums of D products in different orders."""
    q, grad = torch.randn(2, 2, 3, 127, 64, device=device).to(dtype)
    k, v = torch.randn(2, 2, 3, 1, 64, device=device).to(dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    y = fused.attention(*leaves, causal=causal)
    dq, dk, dv = torch.autograd.grad(y, leaves, grad)
    assert torch.equal(y, v.expand_as(y))
    summed = grad.double().sum(2, keepdim=True)
    half_ulp = torch.finfo(torch.float32).eps / 2
    in_any_order = 127 * half_ulp * grad.double().abs().sum(2, keepdim=True)  # any float32 sum
    assert ((dv - summed).abs() <= in_any_order + torch.finfo(dtype).eps / 2 * summed.abs()).all()
    terms = (grad.float().abs() * v.float().abs()).sum(-1).max()
    rounding = 64 * torch.finfo(torch.float32).eps * terms / 64**0.5
    assert dq.abs().max() <= rounding * k.abs().max()
    assert dk.abs().max() <= rounding * q.abs().sum(2).max()


@pytest.mark.parametrize("head_size", [1, 16, 33, 256])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_parity_of_every_size_class(device: str, head_size: int, dtype: torch.dtype) -> None:
    qkv = torch.randn(1, 70, 3 * 2 * head_size, device=device).to(dtype)
    grad = torch.randn(1, 70, 2 * head_size, device=device).to(dtype)
    assert_parity("attention_qkvpacked", [qkv], grad, n_head=2)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_parity_with_dropout(device: str, dtype: torch.dtype, causal: bool) -> None:
    """The plain op applies the same mask, so outputs and gradients must agree."""
    *inputs, grad = torch.randn(4, 1, 2, 129, 25, device=device).to(dtype)
    options = dict(causal=causal, dropout_p=0.3, seed=seed_on(device))
    assert_parity("attention", inputs, grad, **options)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_parity_packed_with_dropout(device: str, dtype: torch.dtype) -> None:
    qkv, grad = torch.randn(2, 70, 3 * 48, device=device), torch.randn(2, 70, 48, device=device)
    options = dict(n_head=3, dropout_p=0.1, seed=seed_on(device))
    assert_parity("attention_qkvpacked", [qkv.to(dtype)], grad.to(dtype), **options)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu_arithmetic", "gpu_arithmetic"])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("factor", [30.0, 1e-3])
def test_scores_of_any_size(device: str, factor: float, dtype: torch.dtype, gpu: bool) -> None:
    """Scores in the thousands overflow exp without the running maximum and have few fractional
    digits, so the subtracted maximum must be exact, whether the scaled product is rounded first
    or not."""
    q, k, v, grad = torch.randn(4, 1, 2, 100, 64, device=device).to(dtype)
    with interpreter.gpu_arithmetic() if gpu else nullcontext():
        assert_parity("attention", [factor * q, factor * k, v], grad)


def test_autocast_casts_like_sdpa(device: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 16, device=device)
    qkv = torch.randn(1, 20, 96, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert fused.attention(q, k.bfloat16(), v).dtype == torch.bfloat16
        assert fused.attention_qkvpacked(qkv, 2).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 9, 45), (1, 9, 48), (9, 1, 45), (2, 9, 96)])
@pytest.mark.parametrize("ops", [reference, torch_ops, fused])
def test_packed_attention_is_contiguous(ops, device: str, shape: tuple[int, int, int]) -> None:
    assert ops.attention_qkvpacked(torch.randn(shape, device=device), 1).is_contiguous()


def test_float32_products_follow_pytorchs_switch() -> None:
    torch.set_float32_matmul_precision("high")  # conftest resets it to "highest"
    assert _host.dot_precision(torch.float32) == "tf32"
    assert _host.dot_precision(torch.bfloat16) == "ieee"
    torch.set_float32_matmul_precision("highest")
    assert _host.dot_precision(torch.float32) == "ieee"


# --------------------------------------------------------------------- the checks of every op


def test_the_largest_head_size() -> None:
    n = MAX_HEAD_SIZE + 1
    x, qkv = ones(1, 1, 2, n), ones(1, 2, 3 * n)
    for name, run in {
        "q": lambda: fused.attention(x, x, x),
        "qkv": lambda: fused.attention_qkvpacked(qkv, 1),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must have a .* of at most {n - 1}, got {n}"):
            run()


def test_a_gpu_without_tritons_products_is_refused() -> None:
    """``fused`` itself raises, for attention and in a block, in half precision and float32."""
    model = GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=64), ops=fused)
    with _host.interpreted(capability=75):
        for run in (
            lambda: fused.attention(*[ones(2, 2, 4, 8)] * 3),
            lambda: fused.attention_qkvpacked(ones(2, 4, 192).half(), 1),
            lambda: model(ids(1, 4)),
        ):
            with pytest.raises(ValueError, match="compute capability 8.0, got 7.5 on cpu: fastgpt"):
                run()


def _heads(n_head: int, length: int = 4, head_size: int = 8) -> Tensor:
    return ones(2, n_head, length, head_size)


def _keys(*sizes: int) -> dict[str, Tensor]:
    return dict(k=_heads(*sizes), v=_heads(*sizes))


def _call(ops: Any, *qkv: Tensor, **options: Any) -> Tensor:
    return ops.attention(*qkv, **options)


def _packed(ops: Any, qkv: Tensor, n_head: int, **options: Any) -> Tensor:
    return ops.attention_qkvpacked(qkv, n_head, **options)


def _documents(ops: Any, *qkv: Tensor) -> Tensor:
    length = qkv[0].shape[2]
    doc_start = starts_of(length, [length // 3, length // 2], device=str(qkv[0].device))
    return ops.attention(*qkv, dropout_p=0.1, doc_start=doc_start)


def _lengths(ops: Any, *qkv: Tensor) -> Tensor:
    lengths = torch.tensor([5, 0], dtype=torch.int32, device=qkv[0].device)
    return ops.attention(*qkv, causal=False, scale=0.3, dropout_p=0.1, key_lengths=lengths)


def _packed_documents(ops: Any, qkv: Tensor) -> Tensor:
    doc_start = starts_of(9, [2, 5], device=str(qkv.device))
    return ops.attention_qkvpacked(qkv, 2, dropout_p=0.1, doc_start=doc_start)


def _drawn_options(draws: Draws, batch: int, length: int | None) -> dict[str, Any]:
    """``length``: of queries and keys, None if they differ."""
    options = draws.dropout() | {"causal": draws.flag()}
    if draws.flag():
        options["scale"] = draws.one_of(0.1, 1.0)
    if options["causal"] and length is not None and draws.flag():
        options["doc_start"] = draws.doc_start(batch, length)
    return options


def _drawn(draws: Draws) -> Drawn:
    batch, heads, size, queries = draws.size(2), draws.size(2), draws.size(16), draws.size(20)
    keys = queries if draws.flag() else draws.size(20)
    options = _drawn_options(draws, batch, queries if keys == queries else None)
    if "doc_start" not in options and draws.flag():
        options["key_lengths"] = torch.randint(keys + 1, (batch,), dtype=torch.int32)
    shapes = [(batch, heads * draws.size(3), queries, size), *[(batch, heads, keys, size)] * 2]
    return partial(_call, **options), [draws.tensor(*s) for s in shapes]


def _packed_drawn(draws: Draws) -> Drawn:
    batch, heads, size, length = draws.size(2), draws.size(2), draws.size(16), draws.size(20)
    options = _drawn_options(draws, batch, length)
    qkv = draws.tensor(batch, length, 3 * heads * size)
    return partial(_packed, n_head=heads, **options), [qkv]


def _masks(n_rows: int, n_cols: int, device: str, **options: Any) -> Masks:
    """q = 0 makes all probabilities equal; with v = 1 (identity) each appears in its own column of
    the output, and likewise in the row of its query in the gradient."""
    q, k = (torch.zeros(1, 1, n, n_cols, device=device) for n in (n_rows, n_cols))
    v = torch.eye(n_cols, device=device).view(1, 1, n_cols, n_cols).requires_grad_()
    y = fused.attention(q, k, v, causal=False, **options)
    grad = torch.eye(n_rows, n_cols, device=device).expand_as(y)
    return y[0, 0] > 0, torch.autograd.grad(y, v, grad)[0][0, 0].mT[:n_rows] > 0


def _compare_tf32() -> None:
    """TF32 operands have 11 bits: errors lie between float32's and bfloat16's (8 bits)."""
    inputs = [torch.randn(1, 2, 40, 32) for _ in range(3)]
    grad = torch.randn(1, 2, 40, 32)
    torch.set_float32_matmul_precision("high")
    got = parity.results(fused.attention, inputs, grad, torch.float32)
    torch.set_float32_matmul_precision("highest")
    exact = parity.results(reference.attention, inputs, grad.double(), torch.float64)
    finer = parity.results(reference.attention, inputs, grad, torch.float32)
    coarser = parity.results(reference.attention, inputs, grad, torch.bfloat16)
    for x, z, low, high in zip(got, exact, finer, coarser, strict=True):
        assert (low - z).norm() < (x - z).norm() < (high - z).norm()


def _compare_lengths(dtype: torch.dtype) -> None:
    """Four query heads, two key heads."""
    options: Any = dict(causal=False, key_lengths=torch.tensor([37, 0], dtype=torch.int32))
    shapes = (2, 4, 40, 32), (2, 2, 70, 32), (2, 2, 70, 32)
    compare(partial(_call, **options), dtype, *shapes)


def _compare_packed(
    dtype: torch.dtype, head_size: int, length: int, documents: bool = False, **options: Any
) -> None:
    """Compare ``attention_qkvpacked`` with two heads."""
    if documents:
        options["doc_start"] = starts_of(length, [length // 3])
    call = partial(_packed, n_head=2, **with_seed(options))
    compare(call, dtype, (1, length, 6 * head_size))


FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
_pipelined = partial(assert_pipelined_pv_is_the_same, 64, 64, FLOAT16, False)
ATTENTION = Cases(
    "attention",
    valid=dict(q=_heads(6), k=_heads(2), v=_heads(2)),
    refused={
        r"k must have shape \(2, 6, T, 8\), or a divisor of 6 as its number": _keys(4),
        r"of heads, to go with q \(2, 6, 4, 8\), got \(2, 0, 4, 8\)": _keys(0),
        "k must have shape .* got": _keys(12),
        "v must have the shape of k": dict(v=_heads(2, 5)),
        r"q must have shape \(B, H, T, D\), got \(6, 4, 8\)": dict(q=_heads(6)[0]),
        "k must hold at least one key": _keys(2, 0),
        "q must have a head size of at least 1": dict(q=_heads(6, 4, 0), **_keys(2, 4, 0)),
        r"dropout_p must lie in \[0, 0.999\], got 1.0": dict(dropout_p=1.0),
        "dropout_p must lie .* got -0.1": dict(dropout_p=-0.1),
        "scale must be positive and finite.*got 0": dict(scale=0.0),
        r"seed must be an int64 tensor .* got shape \(1,\), torch.int32": dict(seed=places(1)),
        r"seed must be an int64 tensor .* got shape \(2,\)": dict(seed=ids(2)),
        "seed must be on the device": dict(seed=ids(1).to("meta")),
        r"doc_start must have shape \(2, 4\) to go with q \(2, 6": dict(doc_start=places(1, 4)),
        "doc_start must be on the device of q": dict(doc_start=places(2, 4).to("meta")),
        "doc_start must be None with causal": dict(doc_start=places(2, 4), causal=False),
        "None unless q and k are equally long": dict(_keys(2, 5), doc_start=places(2, 4)),
        r"key_lengths must have shape \(2,\) to go with q \(2, 6": dict(key_lengths=places(1)),
        "key_lengths must be on the device of q": dict(key_lengths=places(2).to("meta")),
        "None together with doc_start": dict(key_lengths=places(2), doc_start=places(2, 4)),
    },
    compiled=[
        compiled("attention-float32-lengths", _compare_lengths, FLOAT32),
        compiled("attention-bfloat16-lengths", _compare_lengths, BFLOAT16),
        compiled("attention-tf32", _compare_tf32),
        compiled("attention-pipelined-wgmma", _pipelined, 64, 16, sm=(90,)),
        compiled("attention-pipelined-mma", _pipelined, 32, 32, sm=(90,)),
    ],
    calls={
        "": Call(
            [(2, 1, 9, 16)] * 3,
            _call,
            empty=[
                [(0, 2, 9, 16)] * 3,
                [(2, 0, 9, 16)] * 3,
                [(2, 2, 0, 16), *[(2, 2, 9, 16)] * 2],
            ],
            single=[(1, 1, 1, 16)] * 3,
            several=(FLOAT32, [(1, 2, 130, 16)] * 3),
        ),
        "dropout": Call(
            [(2, 1, 9, 16)] * 3, partial(_call, dropout_p=0.5), empty=[[(0, 2, 9, 16)] * 3]
        ),
        "odd head": Call(
            [(2, 2, 9, 15)] * 3, _call, empty=[[(0, 2, 9, 15)] * 3], single=[(1, 1, 1, 1)] * 3
        ),
    },
    variants={
        "documents": Call(
            [(1, 2, 9, 16)] * 3, _documents, several=(FLOAT32, [(1, 2, 130, 16)] * 3)
        ),
        "lengths": Call([(2, 2, 9, 16), (2, 1, 7, 16), (2, 1, 7, 16)], _lengths),
    },
    drawn=_drawn,
    masks=_masks,
    needed=0,
)
PACKED = Cases(
    "attention_qkvpacked",
    valid=dict(qkv=ones(2, 4, 48), n_head=2),
    refused={
        r"qkv must have shape \(B, T, 3C\), got \(4, 48\)": dict(qkv=ones(4, 48)),
        r"multiple of 3 \* n_head, got 48 with n_head=5": dict(n_head=5),
        "qkv must hold at least one token": dict(qkv=ones(1, 0, 48)),
        r"doc_start must have shape \(2, 4\) to go with qkv": dict(doc_start=places(2, 3)),
        "doc_start must be None with causal": dict(doc_start=places(2, 4), causal=False),
    },
    compiled=[
        compiled("attention-float32", _compare_packed, FLOAT32, 16, 70),
        compiled("attention-float32-both", _compare_packed, FLOAT32, 16, 40, True, dropout_p=0.2),
        compiled("attention-float16-full", _compare_packed, FLOAT16, 48, 70, causal=False),
        compiled("attention-bfloat16", _compare_packed, BFLOAT16, 32, 100),
        compiled("attention-bfloat16-documents", _compare_packed, BFLOAT16, 16, 112, True),
        compiled("attention-bfloat16-head-64", _compare_packed, BFLOAT16, 64, 140, sm=(90,)),
        compiled("attention-float16-dropout", _compare_packed, FLOAT16, 16, 70, dropout_p=0.2),
    ],
    calls={
        "": Call(
            [(2, 9, 96)], partial(_packed, n_head=2), empty=[[(0, 9, 96)]], single=[(1, 1, 96)]
        ),
        "odd head": Call(
            [(2, 9, 45)], partial(_packed, n_head=1), empty=[[(0, 9, 45)]], single=[(1, 1, 3)]
        ),
    },
    variants={"documents": Call([(1, 9, 96)], _packed_documents)},
    drawn=_packed_drawn,
    needed=0,
)
