"""Ahead-of-time compilation of toy kernels: known reports, no side effects; how many programs fit
on a multiprocessor.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench._compile import static
from bench._compile.multiprocessor import ARCHITECTURES, programs_that_fit
from bench._compile.static import Compiled, Launch, compile_launches, faults, recorded
from fastgpt.kernels import _host
from fastgpt.kernels.gelu import gelu
from tests.tools import toy_kernels

CAPABILITIES = [80, 90, 100]
BF16 = torch.bfloat16


def compile_launch(launch: Launch, capability: int) -> Compiled:
    (compiled,) = compile_launches([launch], capability)
    return compiled


def matmul(m: int = 64, n: int = 64, k: int = 32, *, num_warps: int = 4, num_stages: int = 3):
    options = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=num_warps, num_stages=num_stages)
    return Launch(toy_kernels.matmul_kernel, (BF16, BF16, BF16, 256, 256, 256), options)


# 8192 accumulators in one warp need 256 registers a thread; the maximum is 255.
SPILLING = Launch(
    toy_kernels.hold_kernel, (torch.float32, torch.float32, 64), dict(BLOCK=8192, num_warps=1)
)


# ------------------------------------------------------------------------------------ compiling


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_matmul_uses_the_tensor_cores_of_its_architecture(capability: int) -> None:
    compiled = compile_launch(matmul(), capability)
    own = ARCHITECTURES[capability].tensor_cores
    for name in static.MATRIX:
        assert (compiled.instructions[name] > 0) == (name == own), name
    assert compiled.instructions["cp.async"] > 0
    assert 16 <= compiled.registers <= 255
    # At least two stages of both operands' tiles lie in shared memory.
    limit = static.max_shared_memory(capability)
    assert 2 * 2 * 64 * 32 * 2 <= compiled.shared_memory <= limit
    assert (compiled.tensor_memory > 0) == (capability == 100)
    assert compiled.programs >= 2 and compiled.half_products == (64,)
    assert faults(compiled) == []


@pytest.mark.parametrize(("capability", "tma"), [(80, False), (90, True), (100, True)])
def test_descriptors_become_tma(capability: int, tma: bool) -> None:
    tensors = torch.empty(256, 256), torch.empty(256, 256)
    descriptors = tuple(TensorDescriptor.from_tensor(x, [32, 32]) for x in tensors)
    options = {"BLOCK_M": 32, "BLOCK_N": 32}
    launch = Launch(toy_kernels.copy_by_descriptor_kernel, descriptors, options)
    compiled = compile_launch(launch, capability)
    assert (compiled.instructions["TMA load"] > 0) == tma
    assert (compiled.instructions["TMA store"] > 0) == tma


def test_spills_are_reported() -> None:
    compiled = compile_launch(SPILLING, 80)
    assert compiled.spilled > 0
    assert faults(compiled) == [
        f"hold_kernel on sm_80 (BLOCK=8192, num_warps=1, num_stages=3): "
        f"spills {compiled.spilled} bytes"
    ]


def test_more_shared_memory_than_the_smallest_of_the_family_has_is_a_fault() -> None:
    """Four stages of 32 KB fit on an A100, but not on sm_86, which uses the same tiles."""
    launch = matmul(128, 128, 64, num_warps=8, num_stages=5)
    compiled = compile_launch(launch, 80)
    assert compiled.shared_memory == 4 * 32 * 1024
    (fault,) = faults(compiled)
    assert fault.startswith("matmul_kernel on sm_80 (BLOCK_M=128, BLOCK_N=128, BLOCK_K=64")
    assert fault.endswith("needs 131072 bytes of shared memory, of 101376")
    assert faults(compile_launch(launch, 90)) == []


def test_a_product_without_its_tensor_cores_is_a_fault() -> None:
    copy = Launch(toy_kernels.cast_kernel, (torch.float32, BF16, 16), dict(BLOCK=16))
    compiled = compile_launch(copy, 90)

    def missing(capability: int, rows: int, **instructions: int) -> list[str]:
        """Faults of a kernel with one bf16 product of ``rows`` rows and these instructions."""
        other = replace(
            compiled,
            capability=capability,
            half_products=(rows,),
            instructions=Counter(instructions),
        )
        return [fault.partition("): ")[2] for fault in faults(other)]

    assert missing(90, 64, wgmma=1) == []
    assert missing(90, 64) == ["wgmma is missing"]
    assert missing(90, 32, mma=1) == []
    assert missing(90, 32) == ["mma is missing"]
    assert missing(80, 64, mma=1) == []
    assert missing(100, 128, tcgen05=1, mma=1) == ["mma where tcgen05 is possible"]


def test_products_that_wait_for_each_other_are_a_fault() -> None:
    compiled = compile_launch(matmul(), 90)
    assert compiled.serialised is None and faults(compiled) == []
    (fault,) = faults(replace(compiled, serialised="insufficient register resources"))
    assert fault.endswith("waits for each wgmma before the next: insufficient register resources")


def copy_registers(*args: object) -> int:
    launch = Launch(toy_kernels.cast_kernel, args, dict(BLOCK=1024, num_warps=4))
    return compile_launch(launch, 80).registers


def test_the_specialisation_is_the_launchers() -> None:
    """A length divisible by 16 and aligned tensors allow vector loads, whether the argument is a
    dtype, a CPU tensor or a meta tensor."""
    aligned = torch.empty(2048)
    vectorised = copy_registers(aligned, aligned, 1024)
    assert vectorised == copy_registers(torch.float32, torch.float32, 1024)
    assert vectorised == copy_registers(aligned.to("meta"), aligned.to("meta"), 1024)
    assert vectorised != copy_registers(aligned[1:], aligned[1:], 1024)


def test_equal_launches_are_compiled_once() -> None:
    def cast(n: int) -> Launch:
        return Launch(toy_kernels.cast_kernel, (torch.float32, BF16, n), dict(BLOCK=64))

    assert len(compile_launches([cast(32), cast(64), cast(33), cast(32)], 80)) == 2


def test_launches_and_compilation_share_a_process(device: str) -> None:
    x, out = torch.randn(4, device=device), torch.empty(4, device=device)
    toy_kernels.cast_kernel[(1,)](x, out, 4, BLOCK=4)
    first = compile_launch(matmul(), 90)
    toy_kernels.cast_kernel[(1,)](x + 1, out, 4, BLOCK=4)
    assert out.equal(x + 1)
    assert compile_launch(matmul(), 90) == first


def _state() -> tuple[object, ...]:
    knobs_now = knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log, knobs.cache.dir
    return driver._active, knobs_now, JITFunction.run, _host.capability, _host.INTERPRETED


def test_nothing_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    before = _state()
    compile_launch(matmul(), 80)
    assert capsys.readouterr().out == ""  # nothing of the assembler's log
    assert _state() == before
    assert 80 not in toy_kernels.matmul_kernel.device_caches
    with pytest.raises(KeyError, match="unrecognised"):
        options = dict(BLOCK=16, BLOCK_X=16)
        compile_launch(Launch(toy_kernels.cast_kernel, (BF16, BF16, 16), options), 80)
    assert _state() == before
    with pytest.raises(ZeroDivisionError), recorded(90):
        _ = 1 // 0
    assert _state() == before


# ------------------------------------------------------------------------------------ recording


def test_launches_are_recorded_and_nothing_is_computed() -> None:
    x = torch.randn(32, requires_grad=True)
    with recorded(90) as launches:
        y = gelu(x, "tanh")
        y.sum().backward()
    forward, backward = launches
    assert (forward.kernel.__name__, backward.kernel.__name__) == (
        "_gelu_fwd_kernel",
        "_gelu_bwd_kernel",
    )
    assert forward.args[0].equal(x) and forward.options["TANH"] is True
    assert y.isnan().all()  # torch.empty is full of NaN in tests
    assert gelu(x).isfinite().all()


# ------------------------------------------------------------------------------- multiprocessors


@pytest.mark.parametrize(
    ("expected", "capability", "registers", "num_warps", "shared", "tensor"),
    [
        # 32 * 128 registers a warp: 4 warps in each of 4 partitions of 16,384
        (2, 90, 128, 8, 48 * 1024, 0),  # "registers"
        # 32 * 255, rounded up to 8192: 2 warps in each partition
        (2, 80, 255, 4, 0, 0),  # "registers"
        # 32 * 146 = 4672, rounded up to 4864: 3 warps in each partition, 12 of the 16 asked for
        (1, 90, 146, 8, 0, 0),  # "registers"
        (2, 80, 32, 4, 80 * 1024, 0),  # "shared memory"
        (1, 90, 32, 4, 227 * 1024, 0),  # "shared memory"
        (0, 86, 32, 4, 100 * 1024, 0),  # "shared memory"
        (16, 90, 16, 4, 0, 0),  # "warps"
        (12, 89, 16, 4, 0, 0),  # "warps"
        (32, 90, 16, 1, 0, 0),  # "programs"
        (2, 100, 64, 4, 0, 256),  # "tensor memory"
    ],
)
def test_programs_on_a_multiprocessor(
    expected: int, capability: int, registers: int, num_warps: int, shared: int, tensor: int
) -> None:
    assert programs_that_fit(capability, registers, num_warps, shared, tensor) == expected
