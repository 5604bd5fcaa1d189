"""Every interpreted launch is lowered to Triton's IR first, specialised as on a GPU."""

import pytest
import torch

from fastgpt.kernels import fused
from tests.tools import lowering, toy_kernels
from tests.tools.small_models import small_model, tokens


@pytest.fixture(autouse=True)
def _nothing_is_lowered_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "_lowered", set())


@pytest.mark.parametrize("large", [2, 16, 2**40])
def test_a_method_of_an_argument_compiles_for_most_numbers(large: int) -> None:
    out = torch.zeros(4, dtype=torch.float64)
    toy_kernels.arguments_kernel[(1,)](out, 0.5, True, None, large)
    assert out[3] == large


def test_a_method_of_an_argument_does_not_compile_for_1() -> None:
    """The launcher hands the kernel the Python number 1; the interpreter never does."""
    with pytest.raises(
        lowering.LoweringError, match=r"(?s)arguments_kernel.*'large': 1.*large\.to"
    ):
        toy_kernels.arguments_kernel[(1,)](torch.zeros(4, dtype=torch.float64), 0.5, True, None, 1)


# -- one token: the length is 1


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention_of_one_query_and_one_key(
    causal: bool, dropout_p: float, dtype: torch.dtype
) -> None:
    q, k, v = (torch.randn(2, 1, 1, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    out = fused.attention(q, k, v, causal=causal, dropout_p=dropout_p)
    out.sum().backward()
    if not dropout_p:
        assert torch.equal(out, v)


@pytest.mark.parametrize("n_head", [1, 2])
def test_attention_of_a_document_of_one_token(n_head: int) -> None:
    qkv = torch.randn(2, 1, 3 * n_head * 16, requires_grad=True)
    doc_start = torch.zeros(2, 1, dtype=torch.int32)
    out = fused.attention_qkvpacked(qkv, n_head, doc_start=doc_start)
    out.sum().backward()
    assert torch.equal(out, qkv[..., 2 * n_head * 16 :])


@pytest.mark.parametrize("n_head", [1, 2])
def test_decoding_into_a_cache_of_one_token(n_head: int) -> None:
    qkv = torch.randn(1, 1, 3 * n_head * 16)
    cache = torch.zeros(2, 1, n_head, 1, 16)
    out = fused.attention_decode(qkv, cache, torch.zeros(1, dtype=torch.int64))
    assert torch.equal(out, qkv[..., 2 * n_head * 16 :])


def test_a_prompt_of_one_token() -> None:
    """What ``fastgpt sample`` begins with."""
    model = small_model().eval()
    expected = model.generate(tokens(1, 1), 3, temperature=0)
    model = type(model)(model.config, ops=fused).eval()
    model.load_state_dict(small_model().state_dict())
    assert torch.equal(model.generate(tokens(1, 1), 3, temperature=0), expected)


def test_an_update_on_one_token() -> None:
    model = small_model()
    idx = tokens(1, 1)
    losses = []
    for ops in (None, fused):
        if ops is not None:
            model = type(model)(model.config, ops=ops)
            model.load_state_dict(small_model().state_dict())
        loss = model(idx, idx)[1]
        loss.backward()
        losses.append(loss.detach())
    assert torch.allclose(*losses)
