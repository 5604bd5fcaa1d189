"""Addresses of the row-wise kernels on tensors of more than 2^31 elements, without the memory."""

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _host
from fastgpt.kernels.embedding import _embedding_op, _position_bwd_op, _token_bwd_op
from fastgpt.kernels.layer_norm_bwd import layer_norm_bwd
from fastgpt.kernels.layer_norm_fwd import layer_norm_fwd
from tests.tools.addresses import checked_addresses


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture(autouse=True)
def _one_tile_a_program() -> Iterator[None]:
    with _host.interpreted(multiprocessors=2**31):
        yield


SEED = _meta(1, dtype=torch.int64)
_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # the Meta key would only give shapes


@triton.jit
def _careless_kernel(x_ptr, n_cols, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * n_cols + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs, mask=offs < 0, other=1.0))


def test_the_check_finds_32_bit_offsets() -> None:
    with checked_addresses():
        _careless_kernel[(2**15 - 1,)](_meta(2**15, 2**16), 2**16, BLOCK=64)
    with pytest.raises(AssertionError), checked_addresses():
        _careless_kernel[(2**15 + 1,)](_meta(2**15 + 1, 2**16), 2**16, BLOCK=64)


@pytest.mark.parametrize("width", [4096, 8192])
def test_layer_norm(width: int) -> None:
    """With dropout, whose counters also run over more than 2^31 elements."""
    dropout_p = 0.1
    n_rows = 2**31 // width + 5
    wide, row = _meta(n_rows, width), _meta(width)
    with checked_addresses() as launched:
        _, total, mean, rstd = layer_norm_fwd(
            wide, wide, row, row, row, SEED, 1e-5, dropout_p, 0, wide.dtype
        )
        layer_norm_bwd(
            wide, wide, wide, row, mean, rstd, SEED, dropout_p, 0, wide.dtype, True, True
        )
    assert len(launched) == (3 if width == 4096 else 4)


def test_embedding() -> None:
    """More than 2^31 elements in the output and in each table; accesses the last row of each."""
    width, length = 2**14, 2**17 + 5
    idx, table = _meta(1, length, dtype=torch.int64), _meta(length, width)
    out = _meta(1, length, width)
    last = length - 1
    with checked_addresses({"idx_ptr": last}):
        _embedding_op.redispatch(_ON_CPU, idx, table, table, SEED, None, 0.1, 0, table.dtype)
    with checked_addresses({"idx_ptr": last}):
        _position_bwd_op.redispatch(_ON_CPU, out, idx, SEED, length, length, table.dtype, 0.1, 0)
    # the run's only band is its last one; all ids are the table's last
    numbers = {"sorted_ptr": last, "order_ptr": last, "ends_ptr": length}
    with checked_addresses(numbers) as launched:
        _token_bwd_op.redispatch(_ON_CPU, out, idx, SEED, length, table.dtype, 0.1, 0)
    assert len(launched) == 2
