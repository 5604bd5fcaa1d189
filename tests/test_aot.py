"""The ahead-of-time compiler reports what is known of toy kernels, and leaves no trace."""

import aot
import pytest
import torch
import toy_kernels
from aot import MAX_SHARED_MEMORY, Compiled, compile_kernel
from triton import knobs
from triton.runtime.driver import driver

CAPABILITIES = [80, 90, 100]


def _matmul(capability: int) -> Compiled:
    return compile_kernel(
        toy_kernels.matmul_kernel,
        [torch.bfloat16, torch.bfloat16, torch.bfloat16, 256, 256, 256],
        constexprs={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32},
        num_warps=4,
        num_stages=3,
        capability=capability,
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_matmul_uses_the_tensor_cores_of_its_architecture(capability: int):
    compiled = _matmul(capability)
    tensor_cores = {80: "HMMA", 90: "HGMMA", 100: "TC5MMA"}
    for architecture, name in tensor_cores.items():
        assert (compiled.instructions[name] > 0) == (architecture == capability), name
    assert compiled.instructions["LDGSTS"] > 0
    assert compiled.instructions["LOCAL"] == 0
    assert 16 <= compiled.registers <= 255
    assert compiled.spill_store_bytes == compiled.spill_load_bytes == compiled.stack_bytes == 0
    # At least two stages of both operands' tiles lie in shared memory.
    assert 2 * 2 * 64 * 32 * 2 <= compiled.shared_memory <= MAX_SHARED_MEMORY[capability]


@pytest.mark.parametrize(("capability", "loads"), [(80, False), (90, True), (100, True)])
def test_descriptors_become_tma(capability: int, loads: bool):
    compiled = compile_kernel(
        toy_kernels.copy_tile_kernel,
        [torch.float32, torch.float32, 256, 256],
        constexprs={"BLOCK_M": 32, "BLOCK_N": 32},
        num_warps=4,
        num_stages=1,
        capability=capability,
    )
    assert (compiled.instructions["TMA_LOAD"] > 0) == loads
    assert (compiled.instructions["TMA_STORE"] > 0) == loads


def test_spills_are_reported():
    """8192 accumulators on one warp: 256 registers a thread, and 255 is the most there is."""
    compiled = compile_kernel(
        toy_kernels.hold_kernel,
        [torch.float32, torch.float32, 64],
        constexprs={"BLOCK": 8192},
        num_warps=1,
        num_stages=1,
        capability=80,
    )
    assert compiled.spill_store_bytes > 0
    assert compiled.spill_load_bytes > 0
    assert compiled.stack_bytes > 0
    assert compiled.instructions["LOCAL"] > 0


def _copies(*args: object) -> int:
    return compile_kernel(
        toy_kernels.cast_kernel,
        args,
        constexprs={"BLOCK": 1024},
        num_warps=4,
        num_stages=1,
        capability=80,
    ).registers


def test_the_specialisation_is_the_launchers():
    """A length divisible by 16 and aligned tensors allow vector loads; a dtype, a tensor on the
    CPU and one without memory say the same."""
    aligned = torch.empty(2048)
    vectorised = _copies(aligned, aligned, 1024)
    assert vectorised == _copies(torch.float32, torch.float32, 1024)
    assert vectorised == _copies(aligned.to("meta"), aligned.to("meta"), 1024)
    assert vectorised != _copies(aligned[1:], aligned[1:], 1024)


def test_launches_and_compilation_share_a_process(device: str):
    x, out = torch.randn(4, device=device), torch.empty(4, device=device)
    toy_kernels.cast_kernel[(1,)](x, out, 4, BLOCK=4)
    first = _matmul(90)
    toy_kernels.cast_kernel[(1,)](x + 1, out, 4, BLOCK=4)
    assert out.equal(x + 1)
    assert _matmul(90) == first


def _state() -> tuple:
    return driver._active, knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log


def test_nothing_is_left_behind(capsys: pytest.CaptureFixture[str]):
    before = _state()
    _matmul(80)
    assert capsys.readouterr().out == ""  # of the assembler's log
    assert _state() == before
    assert 80 not in toy_kernels.matmul_kernel.device_caches
    with pytest.raises(KeyError, match="unrecognised"):
        compile_kernel(
            toy_kernels.cast_kernel,
            [torch.float32, torch.float32, 16],
            constexprs={"BLOCK": 16, "BLOCK_X": 16},
            num_warps=4,
            num_stages=1,
            capability=80,
        )
    assert _state() == before


def test_a_log_without_the_figures_is_an_error():
    with pytest.raises(RuntimeError, match="ptxas"):
        aot._number(r"Used (\d+) registers", "ptxas info: nothing")
