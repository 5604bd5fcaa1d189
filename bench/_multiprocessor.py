"""What an NVIDIA multiprocessor holds and issues, and what a loop of machine code costs it.

Facts from the CUDA C++ Programming Guide (compute capabilities, arithmetic throughput) and NVIDIA's
white papers. The cycles are a model: every pipe at its rate, memory latency hidden, global memory
not looked at. They serve to compare configurations of one kernel that are far apart, no more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from _sass import Instruction, kinds


@dataclass(frozen=True)
class Architecture:
    """Of one multiprocessor, unless it says otherwise."""

    tensor_cores: str  # the kind of its matrix instruction, as in ``_sass``
    shared_memory: int  # bytes; one program gets 1 KB less than this
    warps: int  # that it holds at a time
    programs: int
    macs: int  # dense 16-bit multiply-adds a cycle
    fp32: int  # warp instructions a cycle
    multiprocessors: int  # of the GPU that people have


ARCHITECTURES = {
    80: Architecture("HMMA", 164 * 1024, 64, 32, 1024, 2, 108),  # A100
    86: Architecture("HMMA", 100 * 1024, 48, 16, 512, 4, 82),  # RTX 3090
    89: Architecture("HMMA", 100 * 1024, 48, 24, 512, 4, 128),  # RTX 4090
    90: Architecture("HGMMA", 228 * 1024, 64, 32, 2048, 4, 132),  # H100, H200
    100: Architecture("TC5MMA", 228 * 1024, 64, 32, 4096, 4, 148),  # B200
    120: Architecture("HMMA", 100 * 1024, 48, 32, 512, 4, 170),  # RTX 5090
}

RESERVED_SHARED_MEMORY = 1024  # bytes of each program's share that the system keeps
TENSOR_MEMORY = 512  # columns, sm_100


@dataclass(frozen=True)
class Occupancy:
    """How many programs run side by side on a multiprocessor, and what forbids one more."""

    programs: int
    limited_by: str


def occupancy(
    capability: int, registers: int, num_warps: int, shared_memory: int, tensor_memory: int = 0
) -> Occupancy:
    """``registers`` a thread; ``shared_memory`` bytes and ``tensor_memory`` columns a program."""
    architecture = ARCHITECTURES[capability]
    # Each of the four partitions has 16,384 registers, handed out by 256 to a warp.
    warp_registers = _round_up(32 * registers, 256)
    share = _round_up(shared_memory + RESERVED_SHARED_MEMORY, 128)
    limits = {
        "registers": 4 * (16384 // warp_registers) // num_warps,
        "shared memory": architecture.shared_memory // share,
        "warps": architecture.warps // num_warps,
        "programs": architecture.programs,
    }
    if tensor_memory:
        limits["tensor memory"] = TENSOR_MEMORY // tensor_memory
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limit)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Cycles:
    """Of one program on one multiprocessor, for a run through the instructions, by pipe."""

    tensor: float
    shared: float  # 128 bytes a cycle
    mufu: float
    fp32: float
    alu: float
    shuffle: float
    issue: float  # four warp instructions a cycle

    @property
    def serial(self) -> float:
        """The tensor cores and the busiest other pipe one after the other. As far as one program
        computes a softmax between two products, nothing else is possible."""
        return self.tensor + max(value for name, value in asdict(self).items() if name != "tensor")


def cycles(
    capability: int, instructions: Sequence[Instruction], num_warps: int, macs: int
) -> Cycles:
    """``macs``: multiply-adds of the matrix products among the instructions, of a program."""
    count = kinds(instructions)
    alu = ("COMPARE", "CONVERT", "INTEGER")
    fp32 = count["FP32"] + 2 * count["FP32X2"] + count["HALF"] + count["IMAD"]
    shared = count["LDS"] + count["STS"] + 4 * count["LDSM"]  # LDSM.x4: four matrices
    return Cycles(
        tensor=macs / ARCHITECTURES[capability].macs,
        shared=num_warps * shared + num_warps / 4 * sum(map(_operand_cycles, instructions)),
        mufu=num_warps * count["MUFU"] * 2.0,
        fp32=num_warps * max(fp32 / ARCHITECTURES[capability].fp32, count["IMAD"] / 2.0),
        alu=num_warps * sum(count[name] for name in alu) / 2.0,
        shuffle=float(num_warps * count["SHUFFLE"]),
        issue=num_warps * len(instructions) / 4.0,
    )


def _operand_cycles(instruction: Instruction) -> float:
    """What wgmma reads from shared memory: B always, A unless it lies in registers. 16-bit."""
    found = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.opcode)
    if not found:
        return 0.0
    m, n, k = map(int, found.groups())
    a_in_registers = re.search(r",\s*R\d+(\.reuse)?,\s*gdesc", instruction.operands)
    return (n * k + (0 if a_in_registers else m * k)) * 2 / 128
