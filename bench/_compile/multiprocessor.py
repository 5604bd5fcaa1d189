"""Occupancy of an NVIDIA multiprocessor: its limits per architecture, and how many programs fit.

Sources: the CUDA C++ Programming Guide (compute capabilities) and NVIDIA's white papers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor."""

    tensor_cores: str  # its matrix instruction in PTX, as in ``static.MATRIX``
    shared_memory: int  # bytes; one program can use 1 KB less
    warps: int  # resident at a time
    programs: int  # resident at a time
    multiprocessors: int  # of the GPU named in the table


ARCHITECTURES = {
    75: Architecture("mma", 64 * 1024, 32, 16, 40),  # T4
    80: Architecture("mma", 164 * 1024, 64, 32, 108),  # A100
    86: Architecture("mma", 100 * 1024, 48, 16, 82),  # RTX 3090
    89: Architecture("mma", 100 * 1024, 48, 24, 128),  # RTX 4090
    90: Architecture("wgmma", 228 * 1024, 64, 32, 132),  # H100, H200
    100: Architecture("tcgen05", 228 * 1024, 64, 32, 148),  # B200
    120: Architecture("mma", 100 * 1024, 48, 32, 170),  # RTX 5090
}

RESERVED_SHARED_MEMORY = 1024  # bytes per program that the system reserves
TENSOR_MEMORY = 512  # columns, sm_100


def programs_that_fit(
    capability: int, registers: int, num_warps: int, shared_memory: int, tensor_memory: int = 0
) -> int:
    """How many programs fit on a multiprocessor. ``registers`` per thread; ``shared_memory`` in
    bytes and ``tensor_memory`` in columns per program."""
    architecture = ARCHITECTURES[capability]
    # Each of the four partitions has 16,384 registers, allocated to warps in units of 256.
    warp_registers = _round_up(32 * registers, 256)
    share = _round_up(shared_memory + RESERVED_SHARED_MEMORY, 128)
    return min(
        4 * (16384 // warp_registers) // num_warps,
        architecture.shared_memory // share,
        architecture.warps // num_warps,
        architecture.programs,
        TENSOR_MEMORY // tensor_memory if tensor_memory else architecture.programs,
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
