"""Attention in Triton against the masked matrix product: parity of outputs and gradients, operator
registration. What the mask and the dropout promise is in test_attention_semantics.py.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.kernels import _attention, _host, attention_fwd, configs, fused, reference, torch_ops
from tests.tools import interpreter, parity
from tests.tools.documents import starts_of

LENGTHS = [1, 7, 17, 64, 127, 129]
HEAD_SIZES = [8, 25, 64, 80, 128]


def seed_on(device: str) -> Tensor:
    return torch.tensor([0x1234_5678_9ABC_DEF], device=device)


def qkv_of(device: str, length: int, batch: int = 1, dtype=torch.float32) -> list[Tensor]:
    return list(torch.randn(3, batch, 2, length, 16, device=device).to(dtype))


def assert_parity(name: str, inputs: list[Tensor], grad: Tensor, **options: Any) -> None:
    """The kernel and the plain op, in the inputs' dtype, against the plain op in float64."""
    kernel, plain = (partial(getattr(module, name), **options) for module in (fused, reference))
    names = ["qkv"] if len(inputs) == 1 else ["q", "k", "v"]
    parity.assert_parity(kernel, plain, plain, inputs, grad, names)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("length", LENGTHS)
def test_parity_packed(device: str, length: int, head_size: int) -> None:
    """Each dtype in turn; the masks of test_parity_separate get the two others."""
    case = LENGTHS.index(length) + HEAD_SIZES.index(head_size)
    dtype = parity.DTYPES[(case + 2) % 3]
    n_head, batch = 1 + case % 5, 1 + case % 2
    shape = (batch, length, 3 * n_head * head_size)
    qkv = parity.randn(shape, dtype, device, parity.LAYOUTS[case % 4])
    grad = parity.randn((batch, length, n_head * head_size), dtype, device, "transposed")
    assert_parity("attention_qkvpacked", [qkv], grad, n_head=n_head)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_as_accurate_as_sdpa(device: str, dtype: torch.dtype) -> None:
    """PyTorch's flash kernel rounds less than the plain op in low precision: the closer rival."""
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
    """q, k, v of different lengths and layouts; each dtype, number of heads and scale in turn."""
    case = LENGTHS.index(n_queries) + HEAD_SIZES.index(head_size) + causal
    n_keys = LENGTHS[1 + (LENGTHS.index(n_queries) + case) % 5]  # one key: test_one_key
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
    """Its probability is 1: the output is v, dv the sum of dout. dq and dk are 0, of which the
    float32 kernels miss the rounding of dP - delta, two sums of D products in another order."""
    q, grad = torch.randn(2, 2, 3, 127, 64, device=device).to(dtype)
    k, v = torch.randn(2, 2, 3, 1, 64, device=device).to(dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    y = fused.attention(*leaves, causal=causal)
    dq, dk, dv = torch.autograd.grad(y, leaves, grad)
    assert torch.equal(y, v.expand_as(y))
    summed = grad.double().sum(2, keepdim=True)
    half_ulp = torch.finfo(torch.float32).eps / 2
    in_any_order = 127 * half_ulp * grad.double().abs().sum(2, keepdim=True)  # float32 sums
    assert ((dv - summed).abs() <= in_any_order + torch.finfo(dtype).eps / 2 * summed.abs()).all()
    terms = (grad.float().abs() * v.float().abs()).sum(-1).max()
    rounding = 64 * torch.finfo(torch.float32).eps * terms / 64**0.5
    assert dq.abs().max() <= rounding * k.abs().max()
    assert dk.abs().max() <= rounding * q.abs().sum(2).max()


def _forward_by(monkeypatch: pytest.MonkeyPatch, library: str | None) -> None:
    lookup = configs.lookup

    def said(op: str, kernel: str, *asked: Any) -> Any:
        return library if kernel == "fwd_library" else lookup(op, kernel, *asked)

    monkeypatch.setattr(configs, "lookup", said)


@pytest.mark.gpu  # interpreted there is one forward
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("library", [None, configs.CUDNN])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("n_queries,n_keys", [(127, 127), (64, 130), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parity_of_both_forwards(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    n_queries: int,
    n_keys: int,
    causal: bool,
    library: str | None,
) -> None:
    """Ours and, where it takes the inputs, cuDNN's."""
    _forward_by(monkeypatch, library)
    inputs = [
        parity.randn((2, 3, length, 64), dtype, "cuda", "contiguous")
        for length in (n_queries, n_keys, n_keys)
    ]
    grad = parity.randn((2, 3, n_queries, 64), dtype, "cuda", "transposed")
    assert_parity("attention", inputs, grad, causal=causal, scale=0.2)


def test_what_is_saved_of_cudnn_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for cuDNN with its shapes and natural logarithms: our backward follows it."""
    calls = []

    def cudnn(q, k, v, bias, with_lse, dropout, causal, debug, *, scale):
        assert (bias, with_lse, dropout, debug) == (None, True, 0.0, False)
        calls.append(causal)
        scores = (q @ k.mT * scale).float()
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        out = scores.softmax(-1).to(v.dtype) @ v
        token_major = out.transpose(1, 2).contiguous().transpose(1, 2)
        return token_major, scores.logsumexp(-1, keepdim=True), *[None] * 7

    _forward_by(monkeypatch, configs.CUDNN)
    monkeypatch.setattr(attention_fwd, "_cudnn_can", lambda *_: True)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn)
    for causal in (True, False):
        inputs = [torch.randn(2, 3, 70, 64).bfloat16() for _ in "qkv"]
        grad = torch.randn(2, 3, 70, 64).bfloat16()
        assert_parity("attention", inputs, grad, causal=causal)
    assert set(calls) == {True, False}


class _OnGpu(Tensor):
    is_cuda = True


def test_what_cudnn_does_not_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expanded tensors, with which PyTorch's call of it fails before pytorch/pytorch#175764; shared
    keys; lengths."""
    monkeypatch.setattr(attention_fwd, "SDPAParams", lambda *given: given)
    monkeypatch.setattr(attention_fwd, "can_use_cudnn_attention", lambda given: True)
    full = torch.randn(2, 3, 16, 64).as_subclass(_OnGpu)
    options = _attention.Options(None, None, True, 0.125, 0.0, 0)
    assert attention_fwd._cudnn_can(full, full, full, options)
    for expanded in (full[:, :1].expand(2, 3, 16, 64), full[:1].expand(2, 3, 16, 64)):
        for place in range(3):
            q, k, v = (expanded if i == place else full for i in range(3))
            assert not attention_fwd._cudnn_can(q, k, v, options)
    one = full[:, :1]
    assert not attention_fwd._cudnn_can(full, one, one, options)
    lengths = torch.tensor([16, 3], dtype=torch.int32)
    assert not attention_fwd._cudnn_can(full, full, full, options._replace(key_lengths=lengths))


@pytest.mark.parametrize("library", [None, configs.CUDNN])
def test_parity_of_expanded_keys(
    device: str, library: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries that share the keys of one head."""
    _forward_by(monkeypatch, library)
    q, grad = (parity.randn((2, 3, 33, 64), torch.bfloat16, device, "contiguous") for _ in "qd")
    k, v = (parity.randn((2, 1, 33, 64), torch.bfloat16, device, "contiguous") for _ in "kv")
    assert_parity("attention", [q, k.expand(2, 3, -1, -1), v.expand(2, 3, -1, -1)], grad)


@pytest.mark.parametrize("head_size", [1, 16, 33, 256])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_parity_of_every_size_class(device: str, head_size: int, dtype: torch.dtype) -> None:
    qkv = torch.randn(1, 70, 3 * 2 * head_size, device=device).to(dtype)
    grad = torch.randn(1, 70, 2 * head_size, device=device).to(dtype)
    assert_parity("attention_qkvpacked", [qkv], grad, n_head=2)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_parity_with_dropout(device: str, dtype: torch.dtype, causal: bool) -> None:
    """The plain op applies the same mask, so output and gradients must agree, not only the rate."""
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
    """Scores in the thousands overflow exp without the running maximum, and have few digits behind
    the point: what is subtracted from them must be exact, whether the product with the scale is
    rounded first or not."""
    q, k, v, grad = torch.randn(4, 1, 2, 100, 64, device=device).to(dtype)
    with interpreter.gpu_arithmetic() if gpu else nullcontext():
        assert_parity("attention", [factor * q, factor * k, v], grad)


@pytest.mark.parametrize("mask", ["causal", "full", "documents"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(mask: str, dropout_p: float) -> None:
    lengths = (9, 9, 9) if mask == "documents" else (9, 7, 7)
    inputs = [torch.randn(1, 2, t, 16, dtype=torch.float64, requires_grad=True) for t in lengths]
    options: dict[str, Any] = dict(causal=mask != "full", dropout_p=dropout_p, seed=seed_on("cpu"))
    doc_start = starts_of(9, [1, 4]) if mask == "documents" else None
    op = partial(fused.attention, doc_start=doc_start, **options)
    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)


def test_gradcheck_packed() -> None:
    qkv = torch.randn(2, 9, 3 * 10, dtype=torch.float64, requires_grad=True)
    op = partial(fused.attention_qkvpacked, n_head=2)
    assert torch.autograd.gradcheck(op, [qkv], fast_mode=True)


def test_autocast_casts_like_sdpa(device: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 16, device=device)
    qkv = torch.randn(1, 20, 96, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert fused.attention(q, k.bfloat16(), v).dtype == torch.bfloat16
        assert fused.attention_qkvpacked(qkv, 2).dtype == torch.bfloat16


def test_float32_products_follow_pytorchs_switch() -> None:
    torch.set_float32_matmul_precision("high")  # the next test begins with "highest"
    assert _host.dot_precision(torch.float32) == "tf32"
    assert _host.dot_precision(torch.bfloat16) == "ieee"
    torch.set_float32_matmul_precision("highest")
    assert _host.dot_precision(torch.float32) == "ieee"
