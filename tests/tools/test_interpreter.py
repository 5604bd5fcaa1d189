"""The repaired interpreter computes like a GPU and leaves no patches behind."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import reference
from tests.tools import interpreter, toy_kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Ties, largest values, a subnormal, infinities.
SPECIAL = [0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, 65504.0, 1e-40, float("inf"), -float("inf")]


def _special_and_random(n: int) -> Tensor:
    return torch.cat([torch.tensor(SPECIAL), torch.randn(n - len(SPECIAL))])


# ------------------------------------------------------------------------------------ bfloat16


def test_widen_and_narrow_agree_with_torch_on_every_bfloat16():
    bits = np.arange(2**16, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    finite = ~values.isnan()
    assert torch.from_numpy(interpreter.widen(bits))[finite].equal(values.float()[finite])
    again = torch.from_numpy(interpreter.narrow(interpreter.widen(bits)).view(np.int16))
    assert again.view(torch.bfloat16)[finite].equal(values[finite])
    assert again.view(torch.bfloat16)[~finite].isnan().all()


def arithmetic(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Results of eleven operations, the fourth of them a quotient, and PyTorch's."""
    x, y = torch.randn(2, 300).to(dtype)
    out = torch.empty(11, 300, dtype=dtype)
    toy_kernels.binary_kernel[(1,)](x, y, out, 300, BLOCK=512)
    expected = [x + y, x - y, x * y, x / y, -x, x.maximum(y), x.minimum(y), x.minimum(y)]
    return out, torch.stack([*expected, x.abs(), x * 2.5, x.clamp(-0.5, 0.5)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_is_bit_equal_to_torch(dtype: torch.dtype):
    torch.testing.assert_close(*arithmetic(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_minimum_and_maximum_return_the_number_beside_a_nan(dtype: torch.dtype):
    x = torch.tensor([float("nan"), 1.0], dtype=dtype)
    y = torch.tensor([2.0, float("nan")], dtype=dtype)
    out = torch.empty(11, 2, dtype=dtype)
    toy_kernels.binary_kernel[(1,)](x, y, out, 2, BLOCK=2)
    assert out[5].tolist() == out[6].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("target", [*DTYPES, torch.float64])
@pytest.mark.parametrize("source", [*DTYPES, torch.float64])
def test_casts_round_as_torch_does(source: torch.dtype, target: torch.dtype):
    x = _special_and_random(1000).to(source)
    out = torch.empty(1000, dtype=target)
    toy_kernels.cast_kernel[(1,)](x, out, 1000, BLOCK=1024)
    torch.testing.assert_close(out, x.to(target), rtol=0, atol=0)


@pytest.mark.parametrize("integer", [torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_from_and_to_integers(dtype: torch.dtype, integer: torch.dtype):
    x = torch.randint(-100, 100, (50,)).to(integer)
    out = torch.empty(50, dtype=dtype)
    toy_kernels.cast_kernel[(1,)](x, out, 50, BLOCK=64)
    assert out.equal(x.to(dtype))
    back = torch.empty(50, dtype=integer)
    toy_kernels.cast_kernel[(1,)](out + 0.5, back, 50, BLOCK=64)
    assert back.equal((out + 0.5).to(integer))


def test_a_nan_stays_a_nan_in_every_cast():
    x = torch.full((3,), float("nan"))
    for dtype in DTYPES:
        out = torch.zeros(3, dtype=dtype)
        toy_kernels.cast_kernel[(1,)](x, out, 3, BLOCK=4)
        assert out.isnan().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dot(dtype: torch.dtype):
    a, b = torch.randn(33, 50).to(dtype), torch.randn(50, 20).to(dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(33, 20, dtype=accumulator)
    toy_kernels.matmul_kernel[(3, 2)](
        a, b, out, 33, 20, 50, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    tolerance = 50 * torch.finfo(accumulator).eps
    expected = (a.double() @ b.double()).to(accumulator)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_does_not_depend_on_the_order_of_its_operands(dtype: torch.dtype):
    """Q Kᵀ and K Qᵀ must agree exactly on every CPU, which BLAS does not guarantee."""
    a, b = torch.randn(100, 64).to(dtype), torch.randn(64, 100).to(dtype)
    products = []
    for left, right in ((a, b), (b.T.contiguous(), a.T.contiguous())):
        out = torch.empty(100, 100)
        toy_kernels.matmul_kernel[(2, 4)](
            left, right, out, 100, 100, 64, BLOCK_M=64, BLOCK_N=32, BLOCK_K=64
        )
        products.append(out)
    assert products[0].equal(products[1].T)
    assert products[0].equal((a.double() @ b.double()).float())


@pytest.mark.parametrize("gpu", [False, True])
def test_contraction(gpu: bool):
    """With contraction a product in a sum is exact, unless a selection has used it before."""
    x, y, z = torch.randn(3, 100)
    z[:50] = -(x * y)[:50]  # leaves the product's rounding error
    out = torch.empty(5, 100)
    with interpreter.gpu_arithmetic() if gpu else nullcontext():
        toy_kernels.contraction_kernel[(1,)](x, y, z, out, 100, BLOCK=128)
    product = x.double() * y.double() if gpu else x * y
    expected = [product + z, product - z, z - product, x * y + z, z - product]
    assert torch.equal(out, torch.stack([row.float() for row in expected]))
    assert bool(out[0, :50].any()) == gpu


def test_division_by_a_reciprocal():
    x, y = torch.randn(2, 100)
    out = torch.empty(11, 100)
    with interpreter.gpu_arithmetic():
        toy_kernels.binary_kernel[(1,)](x, y, out, 100, BLOCK=128)
    assert not torch.equal(out[3], x / y)
    torch.testing.assert_close(out[3], x / y, rtol=2**-22, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(dtype: torch.dtype):
    x = torch.randn(4, 32).to(dtype)
    total, most = torch.empty(4, dtype=dtype), torch.empty(4, dtype=dtype)
    where, running = torch.empty(4, dtype=torch.int32), torch.empty(4, 32, dtype=dtype)
    toy_kernels.reduce_kernel[(1,)](x, total, most, where, running, M=4, N=32)
    assert most.equal(x.amax(1))
    assert where.equal(x.argmax(1).int())
    tolerance = 40 * torch.finfo(dtype).eps  # for sums of 32 elements of about 1
    torch.testing.assert_close(total, x.sum(1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(running, x.cumsum(1), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------ language


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elementwise_functions(dtype: torch.dtype):
    x = torch.linspace(-4.0, 4.0, 64, dtype=dtype)
    out = torch.empty(4, 64, dtype=dtype)
    toy_kernels.unary_kernel[(1,)](x, *out, BLOCK=64)
    expected = torch.stack([x.exp(), x.exp2(), x.erf(), x.abs().rsqrt()])
    torch.testing.assert_close(out, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("key", [0, 1234567890123456789, -1])
def test_philox_is_bit_equal_to_the_reference(key: int):
    out = torch.empty(4, 64, dtype=torch.int64)
    toy_kernels.philox_kernel[(1,)](torch.tensor([key]), out, BLOCK=64)
    i = torch.arange(64)
    expected = reference.philox_4x32(key, (i, i + 1, i + 2, torch.full_like(i, 7)))
    assert out.equal(torch.stack(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_trans_join_and_reshape(dtype: torch.dtype):
    x = torch.randn(4, 8).to(dtype)
    transposed, joined = torch.empty(8, 4, dtype=dtype), torch.empty(4, 16, dtype=dtype)
    toy_kernels.shapes_kernel[(1,)](x, transposed, joined, M=4, N=8)
    assert transposed.equal(x.T)
    assert joined.equal(torch.stack([x, -x], dim=-1).reshape(4, 16))


@pytest.mark.parametrize("negate", [False, True])
def test_helpers_tuples_and_loop_bounds_in_device_memory(negate: bool):
    x, bounds, out = torch.randn(10), torch.tensor([2, 5]), torch.empty(10)
    toy_kernels.helpers_kernel[(1,)](x, bounds, out, 10, SCALE=3.0, NEGATE=negate)
    scaled = -3.0 * x if negate else 3.0 * x
    torch.testing.assert_close(out, sum(scaled + x + i for i in (2, 3, 4)))


def test_tl_assume_that_is_wrong_fails():
    x, bounds = torch.randn(10), torch.tensor([0, 1])
    with pytest.raises(AssertionError):
        toy_kernels.helpers_kernel[(1,)](x, bounds, x, -1, SCALE=1.0, NEGATE=False)


def test_descriptors():
    x = torch.randn(20, 36)
    y = torch.zeros(20, 36)
    toy_kernels.copy_tile_kernel[(2, 3)](x, y, 20, 36, BLOCK_M=16, BLOCK_N=16)
    assert y.equal(x)


# ------------------------------------------------------------------------------------ launches


def test_arguments_have_the_types_of_a_compiled_kernel():
    out = torch.zeros(4, dtype=torch.float64)
    toy_kernels.arguments_kernel[(1,)](out, 1 / 3, True, None, 2**40)
    assert out.tolist() == [np.float32(1 / 3), 1.0, 1.0, 2.0**40]


@pytest.mark.parametrize("grid", [(6,), (2, 3), (2, 3, 4), [5], lambda meta: (3, 2)])
def test_every_program_of_the_grid_runs(grid):
    sizes = grid({}) if callable(grid) else grid
    n = int(np.prod(sizes))
    out = torch.full((n,), -1)
    toy_kernels.program_kernel[grid](out)
    assert out.equal(torch.arange(n))


def test_threads_launch_one_after_another():
    """Grid, program and the patched language are global to the process."""
    sizes = [40, 56, 72]
    start = threading.Barrier(len(sizes))

    def launch(n: int) -> list[Tensor]:
        outs = [torch.full((n,), -1) for _ in range(8)]
        start.wait()
        for out in outs:
            toy_kernels.program_kernel[(n // 8, 4, 2)](out)
        return outs

    with ThreadPoolExecutor(len(sizes)) as pool:
        for n, outs in zip(sizes, pool.map(launch, sizes), strict=True):
            assert all(out.equal(torch.arange(n)) for out in outs)


def test_an_empty_grid_runs_nothing():
    toy_kernels.program_kernel[(0,)](torch.empty(0))


def test_strided_views_are_addressed_from_their_own_start():
    x = torch.randn(4, 32)
    out = torch.empty(16)
    toy_kernels.cast_kernel[(1,)](x[2, 16:], out, 16, BLOCK=16)
    assert out.equal(x[2, 16:])


def test_launch_options_are_accepted_and_misspelt_ones_are_not():
    x, out = torch.randn(4), torch.empty(4)
    toy_kernels.cast_kernel[(1,)](x, out, 4, BLOCK=4, num_warps=8, num_stages=2)
    assert out.equal(x)
    with pytest.raises(KeyError, match="num_warp"):
        toy_kernels.cast_kernel[(1,)](x, out, 4, BLOCK=4, num_warp=8)


def test_a_missing_argument_is_an_error():
    with pytest.raises(TypeError, match="BLOCK"):
        toy_kernels.cast_kernel[(1,)](torch.randn(4), torch.empty(4), 4)


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), (2**31,), (1, 1, 1, 1)])
def test_a_grid_that_no_gpu_takes_is_an_error(grid):
    with pytest.raises(ValueError, match="grid"):
        toy_kernels.program_kernel[grid](torch.empty(1))


def test_a_dot_that_the_compiler_refuses_is_an_error():
    x = torch.randn(16, 16)
    with pytest.raises(AssertionError, match="K"):
        toy_kernels.matmul_kernel[(1, 1)](x, x, x, 8, 8, 8, BLOCK_M=16, BLOCK_N=16, BLOCK_K=8)


def _language() -> list[object]:
    owners = (
        tl,
        tl.core,
        tl.math,
        tl.tensor,
        tl.tuple,
        tl.block_type,
        tl.dtype,
        triton.JITFunction,
    )
    return [value for owner in owners for _, value in sorted(vars(owner).items())]


def test_the_language_is_restored_after_a_launch_and_after_a_failure():
    x, out = torch.randn(4), torch.empty(4)
    interpreter._exchanges()
    before = _language()
    toy_kernels.cast_kernel[(1,)](x, out, 4, BLOCK=4)
    assert all(old is new for old, new in zip(before, _language(), strict=True))
    with pytest.raises(AssertionError, match="Assume"):  # fails while interpreted
        toy_kernels.helpers_kernel[(1,)](x, torch.tensor([0, 1]), out, -1, SCALE=1.0, NEGATE=False)
    assert all(old is new for old, new in zip(before, _language(), strict=True))


def test_other_devices_are_left_to_the_compiler():
    """Without a GPU Triton itself raises; what matters is that nothing is interpreted."""
    x = torch.empty(4, device="meta")
    with pytest.raises((RuntimeError, ValueError)):
        toy_kernels.cast_kernel[(1,)](x, x, 4, BLOCK=4)


def test_fma_rounds_once(device: str) -> None:
    x, y = torch.randn(2, 64, device=device)
    out = torch.empty(64, device=device)
    toy_kernels.fma_kernel[(1,)](x, y, -x * y, out, BLOCK=64)  # the product's rounding error
    assert torch.equal(out, (x.double() * y.double() - (x * y).double()).float())
    assert out.count_nonzero() > 32
