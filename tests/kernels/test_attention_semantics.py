"""Attention's guarantees besides parity: causality, containment of NaN, determinism, memory linear
in T, no out-of-bounds access.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastgpt.kernels import _host, configs, fused, reference
from fastgpt.kernels._attention import Options
from fastgpt.kernels.attention_fwd import attention_fwd
from fastgpt.kernels.configs import Attention
from tests.tools.documents import starts_of
from tests.tools.parity import outcome
from tests.tools.sanitizer import sanitize

# All tile shapes of the launch configurations.
TILES = sorted({config[:2] for config in configs.TABLE.values() if isinstance(config, Attention)})


def qkv_of(device: str, length: int, batch: int = 1, dtype=torch.float32) -> list[Tensor]:
    return list(torch.randn(3, batch, 2, length, 16, device=device).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("t", [1, 40, 64, 128])
def test_later_tokens_change_no_bit_of_earlier_outputs(
    device: str, t: int, dtype: torch.dtype
) -> None:
    q, k, v = qkv_of(device, 140, dtype=dtype)
    before = fused.attention(q, k, v)
    for x in (q, k, v):
        x[:, :, t:] = torch.randn_like(x[:, :, t:])
    after = fused.attention(q, k, v)
    assert torch.equal(before[:, :, :t], after[:, :, :t])
    assert not torch.equal(before[:, :, t:], after[:, :, t:])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_the_mask_hides_never_leaks(device: str, which: str, poison: float) -> None:
    """A non-finite later token changes no bit of earlier outputs and their dq."""
    inputs, t = dict(zip("qkv", qkv_of(device, 140), strict=True)), 70
    grad = torch.randn(1, 2, 140, 16, device=device)
    grad[:, :, t:] = 0.0

    y, dq = outcome(fused.attention, list(inputs.values()), grad)[:2]
    inputs[which][:, :, t] = poison
    z, dq_poisoned = outcome(fused.attention, list(inputs.values()), grad)[:2]
    assert torch.equal(y[:, :, :t], z[:, :, :t])
    assert torch.equal(dq[:, :, :t], dq_poisoned[:, :, :t])
    assert not z[:, :, t].isfinite().all(), "the token that is not finite must show"


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_a_visible_value_that_is_not_finite_shows(device: str, poison: float) -> None:
    """Masking must not hide visible values: rows that see it are not finite."""
    q, k, v = qkv_of(device, 100)
    v[:, :, 70, 3] = poison
    y = fused.attention(q, k, v)
    assert y[:, :, :70].isfinite().all()
    assert not y[:, :, 70:, 3].isfinite().any()


@pytest.mark.parametrize("n_queries,n_keys", [(37, 37), (37, 70), (70, 37)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_nothing_past_the_end_is_read(
    device: str, n_queries: int, n_keys: int, causal: bool
) -> None:
    """Views into storage that is NaN elsewhere, forward and backward."""

    def inside(length: int) -> Tensor:
        base = torch.full((1, 2, length + 90, 112), float("nan"), device=device)
        view = base[:, :, 45 : 45 + length, 32:80]  # aligned: not copied
        return view.copy_(torch.randn(view.shape, device=device))

    q, k, v, grad = inside(n_queries), inside(n_keys), inside(n_keys), inside(n_queries)
    leaves = [x.requires_grad_() for x in (q, k, v)]  # no copies
    y = fused.attention(*leaves, causal=causal)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("square", [True, False], ids=["square", "oblong"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_shape_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int], square: bool
) -> None:
    """Wide and tall tiles meet the diagonal, the ends, document borders and the dropout mask in
    different places. The last of three tiles each way is partial. Oblong scores alternate between
    wide and tall."""
    monkeypatch.setattr(configs, "find", lambda *asked: Attention(*tile, 4, 1))
    oblong = [(40, 150), (150, 40)][TILES.index(tile) % 2]
    n_queries, n_keys = (150, 150) if square else oblong
    n_queries, n_keys = (min(n, 2 * max(tile) + 22) for n in (n_queries, n_keys))
    inputs = [torch.randn(2, 1, t, 16) for t in (n_queries, n_keys, n_keys)]
    grad = torch.randn_like(inputs[0])
    masks: list[dict[str, Any]] = [dict(causal=True), dict(causal=False)]
    if n_queries == n_keys:
        masks.append(dict(doc_start=starts_of(n_keys, [17, 18, 40, 64, 140], [3])))
    for mask in masks:
        options = dict(dropout_p=0.2, seed=torch.tensor([7])) | mask
        ops = [partial(module.attention, **options) for module in (fused, reference)]
        with sanitize() if "doc_start" in mask else nullcontext():
            found = [outcome(op, inputs, grad) for op in ops]
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def assert_pipelined_pv_is_the_same(
    n_queries: int, n_keys: int, dtype: torch.dtype, causal: bool, block_m: int, block_n: int,
    doc_start: Tensor | None = None,
) -> None:  # fmt: skip
    """Forward with and without PIPELINED_PV, with dropout: the same products in the same order, so
    the same bits.

    Compiled, this holds for wgmma, which PIPELINED_PV is made for. mma.sync sums the keys of a tile
    in an order set by the layout of the probabilities, and Triton chooses different layouts for
    the two forms: there outputs may differ by the rounding of these sums.
    """
    q, k, v = (torch.randn(1, 2, t, 16).to(dtype) for t in (n_queries, n_keys, n_keys))
    seed, runs = torch.tensor([7]), []
    options = Options(seed, doc_start, causal, 0.25, 0.2, 0)
    for pipelined in (False, True):
        find = mock.Mock(return_value=Attention(block_m, block_n, 4, 3, pipelined))
        with sanitize(), mock.patch.object(configs, "find", find):
            runs.append(attention_fwd(q, k, v, options))
    (plain, plain_lse), (piped, pipelined_lse) = runs
    assert torch.equal(plain_lse, pipelined_lse)
    capability = _host.capability(q.device)
    if capability is None or (capability == 90 and block_m >= 64):
        assert torch.equal(plain, piped)
        return
    # Each of the n_keys additions drops less than 2^-23 of the sum of all |P V|; each tile's and
    # the last two multiplications round by half of that; then both sums are rounded to nearest.
    magnitude = reference.attention(
        *(x.double() for x in (q, k, v.abs())),
        causal=causal,
        dropout_p=0.2,
        seed=seed,
        doc_start=doc_start,
    ).transpose(1, 2)
    roundings = n_keys + (n_keys / block_n + 3) / 2
    info = torch.finfo(dtype)
    spacing = info.eps * torch.maximum(plain.abs(), piped.abs()).double().clamp(info.tiny)
    allowed = 2 * roundings * 2**-23 * magnitude * (1 + info.eps) + spacing
    assert ((plain.double() - piped.double()).abs() <= allowed).all()


@pytest.mark.parametrize("block_m,block_n", [(64, 16), (32, 32), (16, 64)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("n_queries,n_keys", [(64, 64), (150, 150), (20, 150), (150, 20), (9, 5)])
def test_pipelined_pv_gives_the_same_bits(
    n_queries: int, n_keys: int, causal: bool, block_m: int, block_n: int
) -> None:
    """No unmasked tile, one and several; dtypes alternate."""
    dtype = [torch.float16, torch.bfloat16][(n_queries + block_m // 16) % 2]
    assert_pipelined_pv_is_the_same(n_queries, n_keys, dtype, causal, block_m, block_n)


@pytest.mark.parametrize("block_m,block_n", [(64, 16), (32, 32), (16, 64)])
@pytest.mark.parametrize("borders", [[], [20], [100], [33, 64, 148]], ids=str)
def test_pipelined_pv_of_documents(borders: list[int], block_m: int, block_n: int) -> None:
    dtype, doc_start = torch.bfloat16, starts_of(150, borders)
    assert_pipelined_pv_is_the_same(150, 150, dtype, True, block_m, block_n, doc_start)


# -------------------------------------------------------------------- determinism and memory


def test_memory_is_linear_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """No allocation of forward or backward is larger than dqkv."""
    sizes: list[int] = []

    def recorded(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_recorded(*args, **kwargs) -> Tensor:
            out = allocate(*args, **kwargs)
            sizes.append(out.numel())
            return out

        return allocate_recorded

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, recorded(getattr(owner, name)))
    qkv = torch.randn(1, 400, 3 * 16, requires_grad=True)
    fused.attention_qkvpacked(qkv, 1).sum().backward()
    assert max(sizes) == qkv.numel() < 400**2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_peak_memory_is_linear_in_the_length() -> None:
    def peak(length: int) -> int:
        qkv = torch.randn(1, length, 3 * 64, device="cuda", requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        fused.attention_qkvpacked(qkv, 1).sum().backward()
        return torch.cuda.max_memory_allocated()

    assert peak(16384) < 2.2 * peak(8192)
