"""The sanitizer finds each kind of fault in toy kernels and passes correct kernels."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton.runtime.interpreter import interpreter_builder

from tests.tools import interpreter, toy_kernels
from tests.tools.sanitizer import SanitizerError, sanitize

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.bool]


def _copy(dtype: torch.dtype, mask_load: bool = True, other: bool = True) -> tuple[Tensor, Tensor]:
    x, y = torch.ones(20, dtype=dtype), torch.zeros(21, dtype=dtype)
    with sanitize():
        toy_kernels.copy_kernel[(1,)](x, y, 20, MASK_LOAD=mask_load, OTHER=other, BLOCK=32)
    return x, y


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sound_kernel_passes_and_computes_the_same(dtype: torch.dtype):
    x, y = _copy(dtype)
    assert y[:20].equal(x)
    assert y[20] == (20 if dtype != torch.bool else True)


def test_a_matmul_with_ragged_edges_passes():
    a, b, c = torch.randn(33, 50), torch.randn(50, 20), torch.empty(33, 20)
    with sanitize():
        toy_kernels.matmul_kernel[(3, 2)](a, b, c, 33, 20, 50, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16)
    torch.testing.assert_close(c, a @ b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_load_past_the_end(dtype: torch.dtype):
    with pytest.raises(SanitizerError, match=r"program \(0, 0, 0\): load out of bounds, 12 of 32"):
        _copy(dtype, mask_load=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_lanes_without_other_poison_the_result(dtype: torch.dtype):
    _, y = _copy(dtype, other=False)
    assert y[20].isnan()
    assert not y[:20].isnan().any()


def test_masked_lanes_without_other_spoil_an_integer_result():
    x, y = torch.ones(20, dtype=torch.int64), torch.zeros(21, dtype=torch.int64)
    with sanitize():
        toy_kernels.copy_kernel[(1,)](x, y, 20, MASK_LOAD=True, OTHER=False, BLOCK=32)
    assert y[20] != 20


@pytest.mark.parametrize("seed", range(5))
def test_a_program_that_loads_what_another_stores(seed: int):
    with pytest.raises(SanitizerError, match="race: (load|store)"), sanitize(seed):
        toy_kernels.pass_on_kernel[(4,)](torch.zeros(5), 1)
    with sanitize(seed):  # in place, one element per program
        toy_kernels.pass_on_kernel[(4,)](torch.zeros(5), 0)


def test_what_one_launch_stores_the_next_may_load():
    x = torch.zeros(4)
    with sanitize():
        toy_kernels.pass_on_kernel[(4,)](x, 0)
        toy_kernels.pass_on_kernel[(4,)](x, 0)
    assert x.tolist() == [2.0] * 4


store, offset = toy_kernels.store_kernel, toy_kernels.offset_kernel
FAULTS: dict[str, Callable[[], object]] = {
    "store out of bounds, 1 of 16": lambda: store[(1,)](torch.empty(15), 0, 1, 0, BLOCK=16),
    "store out of bounds, 15 of 16": lambda: store[(1,)](torch.empty(15), 0, -1, 0, BLOCK=16),
    "store out of bounds, 4 of 4": lambda: store[(1,)](torch.empty(0), 0, 1, 0, BLOCK=4),
    "race: store to what another program stores": lambda: store[(2,)](
        torch.empty(24), 8, 1, 0, BLOCK=16
    ),
    "race: two lanes": lambda: store[(1,)](torch.empty(1), 0, 0, 1, BLOCK=16),
    "load of what the same program stored": lambda: toy_kernels.store_then_load_kernel[(1,)](
        torch.ones(8), torch.empty(8), BLOCK=8
    ),
    "int32 overflow": lambda: offset[(1,)](torch.ones(1), torch.zeros(1), 2**17, 2**17, WIDE=False),
}
SOUND: dict[str, Callable[[], object]] = {
    "each program its own part": lambda: store[(2,)](torch.empty(32), 16, 1, 0, BLOCK=16),
    "one value from every lane": lambda: store[(1,)](torch.empty(1), 0, 0, 0, BLOCK=16),
    "int64": lambda: offset[(1,)](torch.ones(1), torch.zeros(1), 2**17, 2**17, WIDE=True),
    "philox wraps on purpose": lambda: toy_kernels.philox_kernel[(1,)](
        torch.tensor([-1]), torch.empty(4, 16, dtype=torch.int64), BLOCK=16
    ),
}


@pytest.mark.parametrize("finding", FAULTS)
def test_faults_are_found(finding: str):
    with pytest.raises(SanitizerError, match=finding), sanitize():
        FAULTS[finding]()


@pytest.mark.parametrize("name", SOUND)
def test_sound_launches_pass(name: str):
    with sanitize():
        SOUND[name]()


def test_programs_run_in_an_order_that_the_seed_decides():
    programs = [(i, 0, 0) for i in range(20)]
    orders = []
    for seed in (0, 0, 1):
        with sanitize(seed):
            orders.append(interpreter.observer.programs([], programs))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == programs
    assert interpreter.observer.programs([], programs) == programs


def test_blocks_nest():
    with sanitize():
        with sanitize():
            pass
        with pytest.raises(SanitizerError):
            toy_kernels.store_kernel[(2,)](torch.empty(24), 8, 1, 0, BLOCK=16)


def test_the_device_fixture_checks_every_interpreted_launch(device: str):
    if device == "cuda":
        pytest.skip("compiled kernels are not checked")
    with pytest.raises(SanitizerError):
        toy_kernels.store_kernel[(2,)](torch.empty(24), 8, 1, 0, BLOCK=16)


def test_nothing_is_checked_after_the_block_even_if_it_failed():
    before = (interpreter_builder.__class__, interpreter_builder.options, interpreter.observer)
    with pytest.raises(ZeroDivisionError), sanitize():
        raise ZeroDivisionError
    assert before == (
        interpreter_builder.__class__, interpreter_builder.options, interpreter.observer,
    )  # fmt: skip
    toy_kernels.store_kernel[(2,)](torch.empty(24), 8, 1, 0, BLOCK=16)  # a race


# --------------------------------------------------------------------- conftest's poisoned memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uninitialised_memory_is_nan(dtype: torch.dtype):
    x = torch.zeros(3, 4, dtype=dtype)
    for out in (
        torch.empty(3, 4, dtype=dtype),
        torch.empty((3, 4), dtype=dtype, requires_grad=True),
        torch.empty_like(x),
        torch.empty_strided((3, 4), (1, 3), dtype=dtype),
        x.new_empty(3, 4),
        x.new_empty_strided((3, 4), (1, 3)),
    ):
        assert out.shape == (3, 4)
        assert out.isnan().all()


def test_uninitialised_memory_is_nan_inside_a_custom_op():
    @torch.library.custom_op("test_sanitizer::unwritten", mutates_args=())
    def unwritten(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    unwritten.register_fake(torch.empty_like)
    assert unwritten(torch.ones(3)).isnan().all()
    with FakeTensorMode() as mode:
        assert unwritten(mode.from_tensor(torch.ones(3))).shape == (3,)
    assert torch.compile(unwritten, fullgraph=True)(torch.ones(3)).isnan().all()


def test_integers_and_fake_tensors_are_not_poisoned():
    assert torch.empty(3, dtype=torch.int64).shape == (3,)
    with FakeTensorMode():
        assert torch.empty(3).shape == (3,)
