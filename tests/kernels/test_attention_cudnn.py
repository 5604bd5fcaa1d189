"""cuDNN's attention forward in place of ours: parity, tensors saved for backward, inputs that it
does not get.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.kernels import _attention, attention_fwd, configs
from tests.kernels.test_attention import assert_parity
from tests.tools import parity


def _forward_by(monkeypatch: pytest.MonkeyPatch, library: str | None) -> None:
    lookup = configs.lookup

    def said(op: str, kernel: str, *asked: Any) -> Any:
        return library if kernel == "fwd_library" else lookup(op, kernel, *asked)

    monkeypatch.setattr(configs, "lookup", said)


@pytest.mark.gpu  # the interpreter has only our forward
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
    """Our forward, and cuDNN's for inputs that it supports."""
    _forward_by(monkeypatch, library)
    inputs = [
        parity.randn((2, 3, length, 64), dtype, "cuda", "contiguous")
        for length in (n_queries, n_keys, n_keys)
    ]
    grad = parity.randn((2, 3, n_queries, 64), dtype, "cuda", "transposed")
    assert_parity("attention", inputs, grad, causal=causal, scale=0.2)


def test_what_is_saved_of_cudnn_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our backward follows a stand-in with cuDNN's shapes and natural logarithms."""
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
    """Expanded tensors (PyTorch's cuDNN call fails on them before pytorch/pytorch#175764), shared
    keys, lengths."""
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
    """All query heads share the keys of one head, as an expanded tensor."""
    _forward_by(monkeypatch, library)
    q, grad = (parity.randn((2, 3, 33, 64), torch.bfloat16, device, "contiguous") for _ in "qd")
    k, v = (parity.randn((2, 1, 33, 64), torch.bfloat16, device, "contiguous") for _ in "kv")
    assert_parity("attention", [q, k.expand(2, 3, -1, -1), v.expand(2, 3, -1, -1)], grad)
