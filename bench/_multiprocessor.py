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
    alone: float | None  # a program with no other beside it; see ``_alone``. None without wgmma

    @property
    def serial(self) -> float:
        """The tensor cores and the busiest other pipe one after the other: what a program takes
        that has nothing to do while its products run."""
        return self.tensor + max(
            value for name, value in asdict(self).items() if name not in ("tensor", "alone")
        )


def cycles(
    capability: int, instructions: Sequence[Instruction], num_warps: int, macs: int
) -> Cycles:
    """``macs``: multiply-adds of the matrix products among the instructions, of a program."""
    pipes = _pipes(capability, instructions, num_warps)
    pipes["shared"] += num_warps / 4 * sum(map(_operand_cycles, instructions))
    return Cycles(
        tensor=macs / ARCHITECTURES[capability].macs,
        alone=_alone(capability, instructions, num_warps),
        **pipes,
    )


def _pipes(
    capability: int, instructions: Sequence[Instruction], num_warps: int
) -> dict[str, float]:
    """Cycles by pipe, but for those of the tensor cores and of what they read."""
    count = kinds(instructions)
    alu = ("COMPARE", "CONVERT", "INTEGER")
    fp32 = count["FP32"] + 2 * count["FP32X2"] + count["HALF"] + count["IMAD"]
    shared = count["LDS"] + count["STS"] + 4 * count["LDSM"]  # LDSM.x4: four matrices
    return dict(
        shared=float(num_warps * shared),
        mufu=num_warps * count["MUFU"] * 2.0,
        fp32=num_warps * max(fp32 / ARCHITECTURES[capability].fp32, count["IMAD"] / 2.0),
        alu=num_warps * sum(count[name] for name in alu) / 2.0,
        shuffle=float(num_warps * count["SHUFFLE"]),
        issue=num_warps * len(instructions) / 4.0,
    )


def _alone(capability: int, instructions: Sequence[Instruction], num_warps: int) -> float | None:
    """wgmma runs beside what stands between it and its wait in the machine code: of a program that
    has the multiprocessor for itself, the cycles from one run through the loop to the next. The
    warps run in step, and nothing else takes time: no latency, no barrier."""
    if not any(instruction.kind == "HGMMA" for instruction in instructions):
        return None
    since = 0.0  # when the last wait was over; then, what was issued behind it
    issued: list[Instruction] = []
    free = 0.0  # when the tensor cores will be
    groups: list[float] = []  # when those that can be waited for end
    ends = []
    for _ in range(4):  # until each run takes as long as the one before
        for instruction in instructions:
            if instruction.kind == "HGMMA":
                start = max(free, since + max(_pipes(capability, issued, num_warps).values()))
                macs = instruction.macs() / ARCHITECTURES[capability].macs
                free = start + num_warps / 4 * max(macs, _operand_cycles(instruction))
                if "gsb" in instruction.operands:
                    groups.append(free)
            elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                pending = int(instruction.operands.rpartition(",")[2], 16)
                now = since + max(_pipes(capability, issued, num_warps).values())
                done = groups[: len(groups) - pending]
                since, issued, groups = max([now, *done]), [], groups[len(done) :]
            issued.append(instruction)
        ends.append(since)
    return ends[-1] - ends[-2]


def _operand_cycles(instruction: Instruction) -> float:
    """What wgmma reads from shared memory: B always, A unless it lies in registers. 16-bit."""
    found = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.opcode)
    if not found:
        return 0.0
    m, n, k = map(int, found.groups())
    a_in_registers = re.search(r",\s*R\d+(\.reuse)?,\s*gdesc", instruction.operands)
    return (n * k + (0 if a_in_registers else m * k)) * 2 / 128
