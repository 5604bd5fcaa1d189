"""The ahead-of-time compiler reports what is known of toy kernels, and leaves no trace; the facts
about machine code and multiprocessors behind the report.
"""

import re
from collections import Counter
from dataclasses import replace

import _static
import pytest
import torch
import toy_kernels
from _multiprocessor import ARCHITECTURES, Occupancy, cycles, occupancy
from _sass import Code, Instruction, kinds, parse
from _static import Compiled, Dot, Launch, compile_launch, compile_launches, faults, recorded
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels import _common
from fastgpt.kernels.gelu import gelu

CAPABILITIES = [80, 90, 100]
BF16 = torch.bfloat16


def matmul(m: int = 64, n: int = 64, k: int = 32, *, num_warps: int = 4, num_stages: int = 3):
    options = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=num_warps, num_stages=num_stages)
    return Launch(toy_kernels.matmul_kernel, (BF16, BF16, BF16, 256, 256, 256), options)


# 8192 accumulators on one warp: 256 registers a thread, and 255 is the most there is.
SPILLING = Launch(
    toy_kernels.hold_kernel, (torch.float32, torch.float32, 64), dict(BLOCK=8192, num_warps=1)
)


# ------------------------------------------------------------------------------------ compiling


@pytest.mark.parametrize(
    ("capability", "products", "tensor_cycles"), [(80, 16, 128), (90, 2, 64), (100, 2, 32)]
)
def test_a_matmul_uses_the_tensor_cores_of_its_architecture(
    capability: int, products: int, tensor_cycles: int
) -> None:
    compiled = compile_launch(matmul(), capability)
    own = ARCHITECTURES[capability].tensor_cores
    for name in ("HMMA", "HGMMA", "TC5MMA"):
        assert (compiled.instructions[name] > 0) == (name == own), name
    assert compiled.instructions["LDGSTS"] > 0
    assert compiled.instructions["LOCAL"] == 0
    assert 16 <= compiled.registers <= 255
    assert compiled.spill_store_bytes == compiled.spill_load_bytes == compiled.stack_bytes == 0
    # At least two stages of both operands' tiles lie in shared memory.
    limit = _static.max_shared_memory(capability)
    assert 2 * 2 * 64 * 32 * 2 <= compiled.shared_memory <= limit
    assert (compiled.tensor_memory > 0) == (capability == 100)
    assert compiled.occupancy.programs >= 2
    assert faults(compiled) == []

    assert compiled.name == "matmul_kernel" and compiled.capability == capability
    assert compiled.signature["a_ptr"] == "*bf16 16" and compiled.signature["K"] == "i32 16"
    assert compiled.constexprs == {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "ACC": "fp32"}
    assert (compiled.num_warps, compiled.num_stages) == (4, 3)
    (dot,) = compiled.dots
    assert (dot.m, dot.n, dot.k, dot.dtype, dot.tf32) == (64, 64, 32, "bf16", False)
    assert dot.loop is not None
    # HMMA: 16 x 8 x 16 by each of 4 warps; wgmma and tcgen05: 64 x 64 x 16 at once.
    assert compiled.main_loop[own] == products
    assert compiled.cycles.tensor == tensor_cycles == dot.macs / ARCHITECTURES[capability].macs
    assert compiled.cycles.serial > tensor_cycles


@pytest.mark.parametrize(("capability", "tma"), [(80, False), (90, True), (100, True)])
@pytest.mark.parametrize("made_on", ["device", "host"])
def test_descriptors_become_tma(capability: int, tma: bool, made_on: str) -> None:
    options = {"BLOCK_M": 32, "BLOCK_N": 32}
    if made_on == "host":
        tensors = torch.empty(256, 256), torch.empty(256, 256)
        descriptors = tuple(TensorDescriptor.from_tensor(x, [32, 32]) for x in tensors)
        launch = Launch(toy_kernels.copy_by_descriptor_kernel, descriptors, options)
    else:
        args = (torch.float32, torch.float32, 256, 256)
        launch = Launch(toy_kernels.copy_tile_kernel, args, options)
    compiled = compile_launch(launch, capability)
    assert (compiled.instructions["TMA_LOAD"] > 0) == tma
    assert (compiled.instructions["TMA_STORE"] > 0) == tma


def test_spills_are_reported() -> None:
    compiled = compile_launch(SPILLING, 80)
    assert compiled.spill_store_bytes > 0
    assert compiled.spill_load_bytes > 0
    assert compiled.stack_bytes > 0
    assert compiled.instructions["LOCAL"] > 0
    spilled = compiled.spill_store_bytes + compiled.spill_load_bytes
    assert faults(compiled) == [
        f"hold_kernel on sm_80 (BLOCK=8192, num_warps=1, num_stages=3): spills {spilled} bytes"
    ]


def test_more_shared_memory_than_the_smallest_of_the_family_has_is_a_fault() -> None:
    """Four stages of 32 KB: an A100 has them, a GPU of sm_86, which takes the same tiles, not."""
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
        """Faults if the kernel had one bf16 product of so many rows, and these instructions."""
        other = replace(
            compiled,
            capability=capability,
            dots=[Dot(rows, 64, 64, "bf16", False, 0)],
            instructions=Counter(instructions),
        )
        return [fault.partition("): ")[2] for fault in faults(other)]

    assert missing(90, 64, HGMMA=1) == []
    assert missing(90, 64) == ["HGMMA is missing"]
    assert missing(90, 32, HMMA=1) == []
    assert missing(90, 32) == ["HMMA is missing"]
    assert missing(80, 64, HMMA=1) == []
    assert missing(100, 128, TC5MMA=1, HMMA=1) == ["HMMA where TC5MMA is possible"]


def test_products_that_wait_for_each_other_are_a_fault() -> None:
    compiled = compile_launch(matmul(), 90)
    assert compiled.serialised is None and faults(compiled) == []
    (fault,) = faults(replace(compiled, serialised="insufficient register resources"))
    assert fault.endswith("waits for each wgmma before the next: insufficient register resources")


def copy_registers(*args: object) -> int:
    launch = Launch(toy_kernels.cast_kernel, args, dict(BLOCK=1024, num_warps=4))
    return compile_launch(launch, 80).registers


def test_the_specialisation_is_the_launchers() -> None:
    """A length divisible by 16 and aligned tensors allow vector loads; a dtype, a tensor on the
    CPU and one without memory say the same."""
    aligned = torch.empty(2048)
    vectorised = copy_registers(aligned, aligned, 1024)
    assert vectorised == copy_registers(torch.float32, torch.float32, 1024)
    assert vectorised == copy_registers(aligned.to("meta"), aligned.to("meta"), 1024)
    assert vectorised != copy_registers(aligned[1:], aligned[1:], 1024)


def test_equal_launches_are_compiled_once() -> None:
    def cast(n: int) -> Launch:
        return Launch(toy_kernels.cast_kernel, (torch.float32, BF16, n), dict(BLOCK=64))

    compiled = compile_launches([cast(32), cast(64), cast(33), cast(32)], 80)
    assert [one.signature["n"] for one in compiled] == ["i32 16", "i32"]


def test_launches_and_compilation_share_a_process(device: str) -> None:
    x, out = torch.randn(4, device=device), torch.empty(4, device=device)
    toy_kernels.cast_kernel[(1,)](x, out, 4, BLOCK=4)
    first = compile_launch(matmul(), 90)
    toy_kernels.cast_kernel[(1,)](x + 1, out, 4, BLOCK=4)
    assert out.equal(x + 1)
    assert compile_launch(matmul(), 90) == first


def _state() -> tuple[object, ...]:
    knobs_now = knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log, knobs.cache.dir
    return driver._active, knobs_now, JITFunction.run, _common.capability, _common.INTERPRETED


def test_nothing_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    before = _state()
    compile_launch(matmul(), 80)
    assert capsys.readouterr().out == ""  # of the assembler's log
    assert _state() == before
    assert 80 not in toy_kernels.matmul_kernel.device_caches
    with pytest.raises(KeyError, match="unrecognised"):
        options = dict(BLOCK=16, BLOCK_X=16)
        compile_launch(Launch(toy_kernels.cast_kernel, (BF16, BF16, 16), options), 80)
    assert _state() == before
    with pytest.raises(ZeroDivisionError), recorded(90):
        _ = 1 // 0
    assert _state() == before


def test_a_log_without_the_figures_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ptxas"):
        _static._number(r"Used (\d+) registers", "ptxas info: nothing")


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
        ((2, "registers"), 90, 128, 8, 48 * 1024, 0),
        # 32 * 255, rounded up to 8192: 2 warps in each partition
        ((2, "registers"), 80, 255, 4, 0, 0),
        # 32 * 146 = 4672, rounded up to 4864: 3 warps in each partition, 12 of the 16 asked for
        ((1, "registers"), 90, 146, 8, 0, 0),
        ((2, "shared memory"), 80, 32, 4, 80 * 1024, 0),  # (80 + 1) * 2 <= 164
        ((1, "shared memory"), 90, 32, 4, 227 * 1024, 0),
        ((0, "shared memory"), 86, 32, 4, 100 * 1024, 0),
        ((16, "warps"), 90, 16, 4, 0, 0),
        ((12, "warps"), 89, 16, 4, 0, 0),
        ((32, "programs"), 90, 16, 1, 0, 0),
        ((2, "tensor memory"), 100, 64, 4, 0, 256),
    ],
)
def test_occupancy(
    expected: tuple[int, str],
    capability: int,
    registers: int,
    num_warps: int,
    shared: int,
    tensor: int,
) -> None:
    assert occupancy(capability, registers, num_warps, shared, tensor) == Occupancy(*expected)


def instructions(*texts: str) -> list[Instruction]:
    return [Instruction(*text.partition(" ")[::2], predicated=False) for text in texts]


def test_cycles_by_hand() -> None:
    loop = instructions(
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",  # A and B from shared memory
        "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24",  # A from registers
        *["MUFU.EX2 R1, R1"] * 6,
        *["FFMA R1, R2, R3, R4"] * 12,
        *["IMAD R1, R2, R3, R4"] * 4,
        *["LOP3.LUT R1, R2, R3, R4"] * 5,
        "LDS R1, [R2]",
        "LDSM.16.M88.4 R1, [R2]",
        "SHFL.BFLY R1, R2",
    )
    found = cycles(90, loop, num_warps=8, macs=2 * 2 * 64 * 64 * 16)
    assert found.tensor == 4 * 64 * 64 * 16 / 2048 == 128
    operands = 2 * (64 * 16 * 2 + 64 * 16 * 2 + 64 * 16 * 2) / 128  # bytes, by two warpgroups
    assert found.shared == 8 * (1 + 4) + operands
    assert found.mufu == 8 * 6 * 2
    assert found.fp32 == 8 * (12 + 4) / 4
    assert found.alu == 8 * 5 / 2
    assert found.shuffle == 8
    assert found.issue == 8 * len(loop) / 4
    assert found.serial == 128 + max(96, 8 * 5 + operands)


S = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0"  # 32 cycles
P = "HGMMA.64x64x16.F32.BF16 R56, R4, gdesc[UR8], R56, gsb0"
ALL, ALL_BUT_ONE = (f"WARPGROUP.DEPBAR.LE gsb0, 0x{n}" for n in (0, 1))
SOFTMAX = ["MUFU.EX2 R1, R1"] * 5  # 40 cycles of four warps


@pytest.mark.parametrize(
    ("expected", "loop"),
    [
        (32 + 40 + 32, [S, ALL, *SOFTMAX, P]),  # the product still runs when the loop comes back
        (32 + 40 + 32, [S, ALL, *SOFTMAX, P, ALL]),
        (32 + 40, [S, ALL, P, *SOFTMAX]),  # 32 beside 40
        (32 + 64, [S, ALL, P, P, *SOFTMAX[:2]]),  # 64 beside 16
        (64, [S, ALL_BUT_ONE, P, ALL_BUT_ONE]),  # the tensor cores alone
        (64 + 40 - 32, [S, P, ALL_BUT_ONE, *SOFTMAX, ALL]),  # waits for S, not for P
        (40 + 32, [*SOFTMAX, S, ALL]),
    ],
)
def test_what_stands_between_a_product_and_its_wait_runs_beside_it(
    expected: int, loop: list[str]
) -> None:
    found = cycles(90, instructions(*loop), num_warps=4, macs=1)
    # Beside the pipe that binds, a product takes an issue slot, and so does a wait.
    assert found.alone == pytest.approx(expected, abs=4)


def test_without_wgmma_nothing_is_known_of_what_runs_beside_what() -> None:
    loop = instructions("HMMA.16816.F32.BF16 R1, R2, R3", *SOFTMAX)
    assert cycles(80, loop, num_warps=4, macs=2048).alone is None


# --------------------------------------------------------------------------------- machine code


@pytest.mark.parametrize(
    ("opcode", "kind", "macs"),
    [
        ("HMMA.16816.F32.BF16", "HMMA", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", "HMMA", 16 * 8 * 8),
        ("HGMMA.64x128x16.F32.BF16", "HGMMA", 64 * 128 * 16),
        ("UTCHMMA", "TC5MMA", 0),
        ("UTMALDG.2D", "TMA_LOAD", 0),
        ("LDGSTS.E.BYPASS.128", "LDGSTS", 0),
        ("LDGDEPBAR", "BARRIER", 0),
        ("LDG.E.128", "LDG", 0),
        ("LDL.LU", "LOCAL", 0),
        ("LDSM.16.M88.4", "LDSM", 0),
        ("LDS.128", "LDS", 0),
        ("FFMA2", "FP32X2", 0),
        ("FFMA.FTZ", "FP32", 0),
        ("FMNMX3", "COMPARE", 0),
        ("F2FP.BF16.F32.PACK_AB", "CONVERT", 0),
        ("RED.E.ADD", "ATOMIC", 0),
        ("REDUX.SUM", "SHUFFLE", 0),
        ("R2UR", "UNIFORM", 0),
        ("UIADD3", "UNIFORM", 0),
        ("IADD3", "INTEGER", 0),
        ("BRA.U", "BRANCH", 0),
    ],
)
def test_kinds_of_instructions(opcode: str, kind: str, macs: int) -> None:
    instruction = Instruction(opcode, "", predicated=False)
    assert (instruction.kind, instruction.macs()) == (kind, macs)


def code(*lines: str) -> Code:
    """Lines of machine code, "a:" or "@P0 BRA a", as nvdisasm would list them."""
    at, labels, instructions = 0, dict[str, str](), list[str]()
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = f"0x{at:x}"
        else:
            instructions.append(f"        /*{at:04x}*/             {line} ;")
            at += 16
    listing = "\n".join(['\t.headerflags\t@"EF_CUDA_SM90"', *instructions])
    return parse(re.sub(r"\b[a-z]\b(?= ;)", lambda found: labels[found[0]], listing))


def opcodes(loop: list[Instruction]) -> list[str]:
    return [instruction.opcode for instruction in loop]


def test_the_main_loop_is_innermost_and_multiplies() -> None:
    found = code(
        "MOV R1, R2",
        "a:",  # the outer loop
        "IADD3 R1, R1, 1",
        "b:",  # masked: longer
        "HMMA.16816.F32 R1, R2, R3",
        "FSEL R1, R2, R3",
        "@P0 BRA b",
        "c:",
        "HMMA.16816.F32 R1, R2, R3",
        "BRA.U !UP0, c",
        "d:",
        *["FADD R1, R2, R3"] * 8,
        "@P1 BRA d",
        "@P0 BRA a",
        "@P0 CALL.REL.NOINC f",
        "EXIT",
        "e:",
        "BRA e",
        "f:",  # what is called
        "BPT.TRAP",
    )
    assert opcodes(found.main_loop()) == ["HMMA.16816.F32", "BRA.U"]
    assert [len(loop) for loop in found.loops] == [3, 2, 9]
    assert "BPT.TRAP" not in opcodes(found.instructions)
    assert kinds(found.instructions)["BRANCH"] == 7


def test_a_loop_contains_what_was_moved_behind_the_end_and_its_waiting() -> None:
    found = code(
        "a:",
        "@P0 BRA c",
        "b:",
        "UTCHMMA gdesc[UR6]",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR9], R8",
        "@!P6 BRA d",
        "@P1 BRA a",
        "EXIT",
        "c:",
        "FADD R1, R2, R3",
        "BRA b",
        "d:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR9], R8",
        "@!P6 BRA d",
        "@P1 BRA a",
    )
    (loop,) = found.loops
    assert kinds(loop) == {"TC5MMA": 1, "BARRIER": 2, "FP32": 1, "BRANCH": 6}


def test_a_call_may_be_a_jump_to_the_next_loop() -> None:
    found = code(
        "a:",
        "HMMA.16816.F32 R1, R2, R3",
        "FSEL R1, R2, R3",
        "@P0 CALL.REL.NOINC b",
        "BRA a",
        "b:",
        "HMMA.16816.F32 R1, R2, R3",
        "@P1 BRA b",
        "@P2 CALL.REL.NOINC d",
        "EXIT",
        "c:",
        "BRA c",
        "d:",
        "BPT.TRAP",
    )
    assert [len(loop) for loop in found.loops] == [4, 2]
    assert len(found.instructions) == 9


def test_without_a_loop_the_whole_kernel_counts() -> None:
    found = code("MOV R1, R2", "@P0 EXIT", "FADD R1, R1, R1", "EXIT")
    assert found.loops == [] and found.main_loop() == found.instructions
    with pytest.raises(RuntimeError, match="no instructions"):
        parse("nothing")


def test_the_longest_loop_where_nothing_multiplies() -> None:
    compiled: Compiled = compile_launch(
        Launch(toy_kernels.hold_kernel, (torch.float32, torch.float32, 64), dict(BLOCK=1024)), 90
    )
    assert 0 < sum(compiled.main_loop.values()) < sum(compiled.instructions.values())
    assert compiled.main_loop["LDG"] > 0 and compiled.main_loop["STG"] == 0
    assert compiled.cycles.tensor == 0 and compiled.dots == []
    assert compiled.cycles.serial >= compiled.cycles.issue > 0
