"""Dropout of the Triton ops as one system: one seed a step, a stream for each place that drops."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastgpt.kernels import (
    _host,
    attention_bwd,
    attention_fwd,
    embedding,
    fused,
    layer_norm_bwd,
    layer_norm_fwd,
)

ROWS, COLS, P = 96, 128, 0.5


def _attention(seed: Tensor, dropout_offset: int, device: str) -> Tensor:
    """q = 0 makes all probabilities equal, and v = 1 lets each through in a column of its own."""
    q, k = (torch.zeros(1, 1, n, COLS, device=device) for n in (ROWS, COLS))
    v = torch.eye(COLS, device=device).view(1, 1, COLS, COLS)
    y = fused.attention(
        q, k, v, causal=False, dropout_p=P, seed=seed, dropout_offset=dropout_offset
    )
    return y[0, 0] > 0


def _residual_layer_norm(seed: Tensor, dropout_offset: int, device: str) -> Tensor:
    zeros, ones = (f(ROWS, COLS, device=device) for f in (torch.zeros, torch.ones))
    return (
        fused.residual_layer_norm(
            zeros, ones, ones[0], dropout_p=P, seed=seed, dropout_offset=dropout_offset
        )[1] > 0
    )  # fmt: skip


def _embedding(seed: Tensor, dropout_offset: int, device: str) -> Tensor:
    idx = torch.zeros(1, ROWS, dtype=torch.int64, device=device)
    token, position = torch.ones(1, COLS, device=device), torch.zeros(ROWS, COLS, device=device)
    return (
        fused.embedding(
            idx, token, position, dropout_p=P, seed=seed, dropout_offset=dropout_offset
        )[0]
        > 0
    )


SITES = {
    "attention": _attention,
    "residual_layer_norm": _residual_layer_norm,
    "embedding": _embedding,
}
KERNELS = [
    kernel
    for module in (
        attention_bwd,
        attention_fwd,
        embedding,
        layer_norm_bwd,
        layer_norm_fwd,
    )
    for name, kernel in vars(module).items()
    if isinstance(kernel, JITFunction)
    and name.endswith("_kernel")
    and "dropout_offset" in kernel.arg_names
]
Site = Callable[[Tensor, int, str], Tensor]


@pytest.fixture(params=SITES)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    yield SITES[request.param]


def _agreement(a: Tensor, b: Tensor) -> float:
    """The correlation of two masks whose elements are kept with probability 1/2: for independent
    ones it is normal with standard deviation 1 / sqrt(n)."""
    return 2 * (a == b).double().mean().item() - 1


BOUND = 5 / (ROWS * COLS) ** 0.5  # of a correlation; once in 1.7 million for independent masks


def test_streams_of_one_seed_are_independent(device: str, site: Site) -> None:
    seed = torch.tensor([1234567], device=device)
    masks = [site(seed, dropout_offset, device) for dropout_offset in (0, 1, 2, 25, 2**31 - 1)]
    for i, a in enumerate(masks):
        assert abs(a.double().mean() - 0.5) < BOUND / 2
        for b in masks[:i]:
            assert abs(_agreement(a, b)) < BOUND


@pytest.mark.parametrize("other", [1234568, -1234567, 1234567 + 2**32])
def test_seeds_are_independent(device: str, site: Site, other: int) -> None:
    """The next seed, another sign, and one that differs in the upper half only."""
    masks = [site(torch.tensor([s], device=device), 3, device) for s in (1234567, other)]
    assert abs(_agreement(*masks)) < BOUND


def test_rows_and_neighbouring_columns_are_independent(device: str, site: Site) -> None:
    mask = site(torch.tensor([7], device=device), 0, device)
    for shift in (1, 2, 4, 8, 16, 64):
        assert abs(_agreement(mask[:, shift:], mask[:, :-shift])) < 2 * BOUND
        assert abs(_agreement(mask[shift:], mask[:-shift])) < 2 * BOUND


def test_one_seed_and_stream_give_one_mask(device: str, site: Site) -> None:
    seed = torch.tensor([7], device=device)
    assert torch.equal(site(seed, 4, device), site(seed, 4, device))


def test_places_with_streams_of_their_own_share_no_mask(device: str) -> None:
    """As in a model: the same seed, and each place its own number."""
    seed = torch.tensor([7], device=device)
    a, b, c = (op(seed, dropout_offset, device) for dropout_offset, op in enumerate(SITES.values()))
    assert max(abs(_agreement(x, y)) for x, y in ((a, b), (a, c), (b, c))) < BOUND


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_no_kernel_is_compiled_for_a_stream(kernel: JITFunction) -> None:
    """Triton compiles for integers that are 1 or divisible by 16, unless told not to."""
    assert len(KERNELS) == 9
    (dropout_offset,) = (p for p in kernel.params if p.name == "dropout_offset")
    assert dropout_offset.do_not_specialize and not dropout_offset.is_constexpr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_another_stream_launches_the_same_binaries(site: Site) -> None:
    seed = torch.tensor([7], device="cuda")
    site(seed, 5, "cuda")
    before = [len(cache[0]) for kernel in KERNELS for cache in kernel.device_caches.values()]
    for dropout_offset in (0, 1, 16, 2**31 - 1):
        site(seed, dropout_offset, "cuda")
    assert before == [
        len(cache[0]) for kernel in KERNELS for cache in kernel.device_caches.values()
    ]


def test_dropout_arguments() -> None:
    """Sixteen bits an element: the rate is the nearest multiple of 2^-16, the scale its inverse."""
    for p in (0.0, 2**-16, 0.1, 0.2, 0.5, 0.999):
        threshold, scale, drops = _host.dropout_arguments(p).values()
        assert abs(threshold / 2**16 - p) <= 2**-17 and drops == (p > 0.0)
        assert scale * (2**16 - threshold) == pytest.approx(2**16)
