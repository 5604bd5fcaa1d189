"""Dropout across the Triton ops: one seed per step, a separate stream for each dropout."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastgpt.kernels import _host, reference
from tests.kernels.every_op import CASES
from tests.tools.calls import Masks

ROWS, COLS = 96, 128
SITES = {op: cases.masks for op, cases in CASES.items() if cases.masks}
_JITTED = {
    kernel.__name__: kernel
    for name, module in sys.modules.items()
    if name.startswith("fastgpt.kernels.")
    for kernel in vars(module).values()
    if isinstance(kernel, JITFunction)
}
KERNELS = [
    kernel
    for name, kernel in sorted(_JITTED.items())
    if name.endswith("_kernel") and "dropout_offset" in kernel.arg_names
]
each_place = pytest.mark.parametrize("masks", SITES.values(), ids=SITES)


def _mask(seed: int, stream: int) -> Tensor:
    """A mask that drops half."""
    return reference.dropout_mask(torch.tensor([seed]), (ROWS, COLS), 0.5, stream)[0]


def _agreement(a: Tensor, b: Tensor) -> float:
    """The correlation of two masks whose elements are kept with probability 1/2: for independent
    ones it is normal with standard deviation 1 / sqrt(n)."""
    return 2 * (a == b).double().mean().item() - 1


BOUND = 5 / (ROWS * COLS) ** 0.5  # of a correlation: once in 1.7 million for independent masks


@each_place
@pytest.mark.parametrize("p", [0.25, 0.999])
def test_masks_are_the_reference_s(device: str, masks: Callable[..., Masks], p: float) -> None:
    seed = torch.tensor([-(2**50) - 11], device=device)
    expected, _ = reference.dropout_mask(seed, (ROWS, COLS), p, 2**31 - 1)
    for mask in masks(ROWS, COLS, device, dropout_p=p, seed=seed, dropout_offset=2**31 - 1):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_the_rate(p: float) -> None:
    """The share of dropped elements in 10^6."""
    mask, share = reference.dropout_mask(torch.tensor([-(2**40) - 7]), (2, 4, 2048, 64), p)
    assert abs(1 - mask.double().mean() - p) < 0.002
    assert abs(share - (1 - p)) < 2**-16


@each_place
def test_without_a_seed_each_call_draws_a_mask(device: str, masks: Callable[..., Masks]) -> None:
    """The backward repeats the forward's mask; PyTorch's seed determines it."""
    torch.manual_seed(5)
    (first, again), (second, _) = (masks(ROWS, COLS, device, dropout_p=0.5) for _ in range(2))
    assert torch.equal(first, again) and abs(_agreement(first, second)) < BOUND
    torch.manual_seed(5)
    assert torch.equal(masks(ROWS, COLS, device, dropout_p=0.5)[0], first)


def test_streams_of_one_seed_are_independent() -> None:
    masks = [_mask(1234567, stream) for stream in (0, 1, 2, 25, 2**31 - 1)]
    for i, a in enumerate(masks):
        assert abs(a.double().mean() - 0.5) < BOUND / 2
        for b in masks[:i]:
            assert abs(_agreement(a, b)) < BOUND


@pytest.mark.parametrize("other", [1234568, -1234567, 1234567 + 2**32])
def test_seeds_are_independent(other: int) -> None:
    """The next seed, the opposite sign, and one that differs only in the upper 32 bits."""
    assert abs(_agreement(_mask(1234567, 3), _mask(other, 3))) < BOUND


def test_rows_and_neighbouring_columns_are_independent() -> None:
    mask = _mask(7, 0)
    for shift in (1, 2, 4, 8, 16, 64):
        assert abs(_agreement(mask[:, shift:], mask[:, :-shift])) < 2 * BOUND
        assert abs(_agreement(mask[shift:], mask[:-shift])) < 2 * BOUND


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_no_kernel_is_compiled_for_a_stream(kernel: JITFunction) -> None:
    """By default Triton specialises integers that are 1 or divisible by 16."""
    assert len(KERNELS) == 9
    (dropout_offset,) = (p for p in kernel.params if p.name == "dropout_offset")
    assert dropout_offset.do_not_specialize and not dropout_offset.is_constexpr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@each_place
def test_another_stream_launches_the_same_binaries(masks: Callable[..., Masks]) -> None:
    def binaries(stream: int) -> list[int]:
        seed = torch.tensor([7], device="cuda")
        masks(ROWS, COLS, "cuda", dropout_p=0.5, seed=seed, dropout_offset=stream)
        return [len(cache[0]) for kernel in KERNELS for cache in kernel.device_caches.values()]

    before = binaries(5)
    for stream in (0, 1, 16, 2**31 - 1):
        assert binaries(stream) == before


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5)])
def test_the_dropout_mask_of_nothing(shape: tuple[int, ...]) -> None:
    mask, _ = reference.dropout_mask(torch.tensor([1]), shape, 0.5)
    assert mask.shape == shape


def test_dropout_arguments() -> None:
    """16 bits an element: the rate is the nearest multiple of 2^-16, the scale follows from it."""
    for p in (0.0, 2**-16, 0.1, 0.2, 0.5, 0.999):
        threshold, scale, drops = _host.dropout_arguments(p).values()
        assert abs(threshold / 2**16 - p) <= 2**-17 and drops == (p > 0.0)
        assert scale * (2**16 - threshold) == pytest.approx(2**16)


def test_philox_known_answers() -> None:
    """Test vectors of Random123 (Salmon et al. 2011) for philox4x32-10."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, expected in [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones << 32) | ones, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0x299F31D0 << 32) | 0xA4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]:
        c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
        words = reference.philox_4x32(key, (c0, c1, c2, c3))
        assert tuple(int(w) for w in words) == expected
