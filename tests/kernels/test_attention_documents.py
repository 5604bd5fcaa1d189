"""Attention with several documents in one sequence (``doc_start``): parity of outputs and
gradients, isolation of the documents.
"""

from functools import partial

import pytest
import torch

from fastgpt.kernels import configs, fused, reference, torch_ops
from tests.kernels.test_attention import assert_parity, seed_on
from tests.kernels.test_attention_semantics import qkv_of
from tests.tools import parity
from tests.tools.documents import DOCUMENTS, starts_of

OPTIONS = [("documents",), ("dropout", "documents")]
CASES = pytest.mark.parametrize("length,borders", DOCUMENTS, ids=str)


@CASES
def test_parity_packed(device: str, length: int, borders: list[int]) -> None:
    """The second sequence has other borders; dtypes alternate."""
    case = DOCUMENTS.index((length, borders))
    dtype = parity.DTYPES[(case + case // 3) % 3]
    n_head, head_size = 1 + case % 3, (16, 25, 64)[case % 3]
    doc_start = starts_of(length, borders, borders[::2], device=device)
    qkv = parity.randn((2, length, 3 * n_head * head_size), dtype, device, parity.LAYOUTS[case % 4])
    grad = parity.randn((2, length, n_head * head_size), dtype, device, "transposed")
    assert_parity("attention_qkvpacked", [qkv], grad, n_head=n_head, doc_start=doc_start)


@pytest.mark.parametrize("length,borders", DOCUMENTS[2:], ids=str)
def test_parity_separate_with_dropout(device: str, length: int, borders: list[int]) -> None:
    """A different dtype than in the test above. Documents of only one token are left out: there dq
    and dk are 0 up to the rounding of O, which the plain op does not have."""
    case = DOCUMENTS.index((length, borders))
    dtype = parity.DTYPES[(case + case // 3 + 1) % 3]
    *inputs, grad = torch.randn(4, 1, 2, length, 25, device=device).to(dtype)
    doc_start = starts_of(length, borders, device=device)
    options = dict(dropout_p=0.3, seed=seed_on(device), scale=0.3, doc_start=doc_start)
    assert_parity("attention", inputs, grad, **options)


@CASES
@pytest.mark.parametrize("module", [fused, torch_ops, reference])
def test_documents_are_what_they_are_alone(module, length: int, borders: list[int]) -> None:
    inputs, grad = qkv_of("cpu", length), torch.randn(1, 2, length, 16)
    together = parity.outcome(
        partial(module.attention, doc_start=starts_of(length, borders)), inputs, grad
    )
    for begin, end in zip([0, *borders], [*borders, length], strict=True):
        parts = [x[:, :, begin:end] for x in (*inputs, grad)]
        alone = parity.outcome(module.attention, parts[:3], parts[3])
        for x, y in zip(together, alone, strict=True):
            torch.testing.assert_close(x[:, :, begin:end], y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "length,dtype", [(1, torch.float16), (64, torch.float32), (150, torch.bfloat16)], ids=str
)
def test_one_document_gives_the_same_bits_as_none(
    monkeypatch: pytest.MonkeyPatch, device: str, length: int, dtype: torch.dtype, dropout_p: float
) -> None:
    """With the same tiles: on a GPU documents may use others, which sum in another order."""
    find = configs.find
    monkeypatch.setattr(configs, "find", lambda *asked: find(*asked[:4], *OPTIONS[dropout_p > 0]))
    inputs = qkv_of(device, length, 2, dtype)
    grad = torch.randn_like(inputs[0])
    op = partial(fused.attention, dropout_p=dropout_p, seed=seed_on(device))
    doc_start = starts_of(length, [], [], device=device)
    runs = [parity.outcome(partial(op, doc_start=s), inputs, grad) for s in (None, doc_start)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("borders", [[70], [64], [30, 128]], ids=str)
def test_a_document_changes_no_bit_of_another(
    device: str, borders: list[int], dtype: torch.dtype
) -> None:
    """Outputs and all gradients of the documents before and after it."""
    length = 140
    inputs = qkv_of(device, length, dtype=dtype)
    grad = torch.randn_like(inputs[0])
    op = partial(fused.attention, doc_start=starts_of(length, borders, device=device))
    before = parity.outcome(op, inputs, grad)
    for begin, end in zip([0, *borders], [*borders, length], strict=True):
        changed = [x.clone() for x in (*inputs, grad)]
        for x in changed:
            x[:, :, begin:end] = torch.randn_like(x[:, :, begin:end])
        after = parity.outcome(op, changed[:3], changed[3])
        for x, y in zip(before, after, strict=True):
            assert torch.equal(x[:, :, :begin], y[:, :, :begin])
            assert torch.equal(x[:, :, end:], y[:, :, end:])
            assert not torch.equal(x[:, :, begin:end], y[:, :, begin:end])


POISONS = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize(
    ("place", "which", "poison"),  # each pair of values once
    [
        (place, which, POISONS[(i + j) % 3])
        for i, place in enumerate((20, 64, 90))
        for j, which in enumerate("qkv")
    ],
)
def test_what_is_not_finite_in_another_document_never_leaks(
    device: str, place: int, which: str, poison: float
) -> None:
    """Outputs and dq are equal bit for bit; for a poisoned key or value, dk and dv as well. (A
    non-finite query is multiplied by zeros in its neighbours' dk.)"""
    borders, length = [40, 100], 150
    begin, end = (0, 40) if place < 40 else (40, 100)
    inputs = dict(zip("qkv", qkv_of(device, length), strict=True))
    grad = torch.randn_like(inputs["q"])
    grad[:, :, begin:end] = 0.0
    op = partial(fused.attention, doc_start=starts_of(length, borders, device=device))
    before = parity.outcome(op, list(inputs.values()), grad)
    inputs[which][:, :, place] = poison
    after = parity.outcome(op, list(inputs.values()), grad)
    for x, y in list(zip(before, after, strict=True))[: 2 if which == "q" else 4]:
        assert torch.equal(x[:, :, :begin], y[:, :, :begin])
        assert torch.equal(x[:, :, end:], y[:, :, end:])
    assert not after[0][:, :, place].isfinite().all(), "the token that is not finite must show"


@pytest.mark.parametrize("kind", ["random", "falling", "behind", "extreme"])
def test_whatever_starts_holds_is_within_bounds(device: str, kind: str) -> None:
    """The sanitizer checks all addresses; a query always sees itself, so outputs are finite."""
    length = 150
    places = torch.arange(length, dtype=torch.int32)
    extreme = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)
    doc_start = {
        "random": torch.randint(-300, 300, (2, length), dtype=torch.int32),
        "falling": places.flip(0).expand(2, length),
        "behind": (places + 70).expand(2, length),
        "extreme": extreme[torch.randint(2, (2, length))],
    }[kind]
    inputs = qkv_of(device, length, batch=2)
    op = partial(fused.attention, doc_start=doc_start.to(device))
    assert parity.outcome(op, inputs, torch.randn_like(inputs[0]))[0].isfinite().all()


def test_expanded_starts(device: str) -> None:
    inputs = qkv_of(device, 90, batch=3)
    grad = torch.randn_like(inputs[0])
    row = starts_of(90, [30, 71], device=device)
    runs = [
        parity.outcome(partial(fused.attention, doc_start=s), inputs, grad)
        for s in (row.expand(3, 90), row.repeat(3, 1))
    ]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
