"""The launch tables of attention."""

import torch
import triton

from fastgpt.kernels import _host

# Kernel and head size, rounded up → (BLOCK_M, BLOCK_N, num_warps, num_stages).
# Chosen by ahead-of-time compilation: large tiles that spill no register. Predicted, not measured.
# Philox and the borders of documents take registers: where dropout, documents or both need another
# tile, they have a line of their own.
_Tiles = dict[
    tuple[str, int] | tuple[str, int, str] | tuple[str, int, str, str], tuple[int, int, int, int]
]

# sm_90: wgmma leaves the operands in shared memory, of which there is 227 KB.
TENSOR_CORE_TILES: _Tiles = {
    ("fwd", 16): (128, 64, 4, 3),
    ("fwd", 16, "dropout"): (64, 64, 4, 3),
    ("fwd", 32): (128, 64, 4, 3),
    ("fwd", 32, "dropout"): (64, 64, 4, 2),
    ("fwd", 64): (128, 64, 8, 3),
    ("fwd", 64, "documents"): (128, 64, 8, 2),
    ("fwd", 64, "dropout"): (64, 64, 4, 3),
    ("fwd", 128): (128, 64, 8, 2),
    ("fwd", 128, "dropout"): (64, 32, 4, 2),
    ("fwd", 256): (64, 32, 8, 2),
    ("dq", 16): (64, 64, 4, 2),
    ("dq", 32): (64, 64, 4, 2),
    ("dq", 64): (64, 64, 4, 3),
    ("dq", 128): (64, 32, 4, 2),
    ("dq", 256): (64, 32, 8, 2),
    ("dq", 256, "dropout"): (64, 16, 8, 2),
    ("dkdv", 16): (64, 64, 4, 2),
    ("dkdv", 32): (32, 64, 8, 2),
    ("dkdv", 64): (64, 64, 4, 3),
    ("dkdv", 64, "dropout"): (32, 64, 4, 2),
    ("dkdv", 128): (32, 128, 8, 2),
    ("dkdv", 128, "dropout"): (16, 128, 8, 2),
    ("dkdv", 256): (16, 32, 4, 1),
    ("dkdv", 256, "dropout"): (16, 32, 8, 1),
}

# sm_100: tcgen05 keeps its sums in tensor memory, 128 rows for four warps.
TENSOR_MEMORY_TILES: _Tiles = TENSOR_CORE_TILES | {
    ("fwd", 64): (128, 64, 4, 3),
    ("fwd", 64, "documents"): (128, 64, 4, 3),
    ("dq", 64): (128, 64, 4, 2),
    ("dq", 64, "dropout"): (64, 64, 4, 3),
    ("dkdv", 128): (64, 64, 4, 2),
}

# Elsewhere (sm_80, sm_86, sm_89, sm_120) operands pass through registers, and some have 99 KB only.
SMALL_MEMORY_TILES: _Tiles = TENSOR_CORE_TILES | {
    ("fwd", 16): (64, 64, 4, 2),
    ("fwd", 32): (64, 64, 4, 2),
    ("fwd", 64): (128, 64, 8, 3),
    ("fwd", 64, "documents"): (128, 64, 8, 3),
    ("fwd", 64, "dropout"): (64, 32, 4, 2),
    ("fwd", 128): (64, 32, 4, 2),
    ("fwd", 128, "dropout", "documents"): (64, 32, 4, 1),
    ("dq", 16): (64, 32, 4, 2),
    ("dq", 32): (64, 32, 4, 2),
    ("dq", 64): (64, 32, 4, 2),
    ("dq", 64, "dropout"): (64, 32, 8, 2),
    ("dq", 128, "dropout"): (64, 16, 4, 2),
    ("dq", 256): (32, 32, 8, 1),
    ("dq", 256, "dropout"): (32, 32, 8, 1),
    ("dkdv", 64): (32, 128, 8, 2),
    ("dkdv", 64, "dropout"): (32, 128, 8, 2),
    ("dkdv", 128): (32, 64, 8, 1),
    ("dkdv", 128, "dropout"): (32, 64, 8, 1),
    ("dkdv", 256): (16, 32, 8, 1),
}

# float32: IEEE products are FMAs from registers; TF32 fits wherever they do.
FLOAT32_TILES: _Tiles = {
    ("fwd", 16): (32, 32, 4, 1),
    ("fwd", 16, "dropout", "documents"): (32, 16, 4, 1),
    ("fwd", 32): (32, 32, 4, 1),
    ("fwd", 32, "dropout"): (32, 16, 4, 2),
    ("fwd", 64): (64, 32, 8, 1),
    ("fwd", 64, "dropout"): (16, 16, 8, 1),
    ("fwd", 128): (16, 16, 4, 1),
    ("fwd", 128, "documents"): (32, 16, 8, 1),
    ("fwd", 128, "dropout"): (16, 16, 4, 2),
    ("fwd", 128, "dropout", "documents"): (16, 16, 4, 1),
    ("fwd", 256): (16, 16, 8, 1),
    ("fwd", 256, "dropout"): (32, 16, 8, 2),
    ("dq", 16): (32, 32, 4, 1),
    ("dq", 32): (32, 32, 4, 1),
    ("dq", 32, "documents"): (32, 32, 4, 2),
    ("dq", 64): (32, 32, 8, 1),
    ("dq", 128): (16, 16, 8, 1),
    ("dq", 256): (16, 16, 8, 2),
    ("dkdv", 16): (32, 64, 8, 1),
    ("dkdv", 16, "dropout"): (16, 32, 8, 1),
    ("dkdv", 32): (32, 64, 8, 1),
    ("dkdv", 64): (32, 32, 8, 1),
    ("dkdv", 64, "dropout"): (16, 16, 8, 1),
    ("dkdv", 128): (16, 16, 4, 1),
    ("dkdv", 256): (16, 16, 8, 1),
    ("dkdv", 32, "dropout", "documents"): (32, 32, 8, 1),
}

# The interpreter pays by the operation, not by the register.
INTERPRETER_TILES: _Tiles = dict.fromkeys(TENSOR_CORE_TILES, (64, 64, 4, 1))


# Registers a thread may have, so that two programs share a multiprocessor: the loop needs no more,
# but without a limit ptxas takes more for the masked tiles. sm_90, half precision, no dropout. What
# Triton 3.9 makes of the kernel spills 128 bytes under it, and nothing without.
MAX_REGISTERS: dict[tuple[str, int], int] = (
    {("fwd", 64): 128} if triton.__version__.startswith("3.6.") else {}
)


def tiles(capability: int | None, dtype: torch.dtype) -> _Tiles:
    """The table for a GPU, or for the interpreter: None."""
    if capability is None:
        return INTERPRETER_TILES
    if dtype == torch.float32:
        return FLOAT32_TILES
    if 100 <= capability < 120:
        return TENSOR_MEMORY_TILES
    return TENSOR_CORE_TILES if capability == 90 else SMALL_MEMORY_TILES


def launch(
    kernel: str,
    device: torch.device,
    head_size: int,
    dtype: torch.dtype,
    dropout: bool,
    documents: bool,
) -> dict[str, int]:
    block_d = max(16, triton.next_power_of_2(head_size))
    capability = _host.capability(device)
    table = tiles(capability, dtype)
    tile = table[kernel, block_d]
    if dropout:
        tile = table.get((kernel, block_d, "dropout"), tile)
    if documents and dropout:
        tile = table.get((kernel, block_d, "dropout", "documents"), tile)
    elif documents:
        tile = table.get((kernel, block_d, "documents"), tile)
    block_m, block_n, num_warps, num_stages = tile
    constexprs = dict(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    # Elsewhere no product runs beside a softmax of its own program, or (sm_100) Triton sees to it.
    if kernel == "fwd" and _host.is_half(dtype) and capability in (None, 90):
        constexprs["LATE"] = True
    if kernel == "dkdv" and _host.is_half(dtype) and capability == 90:  # left operands in registers
        constexprs["WGMMA"] = True
    if table is TENSOR_CORE_TILES and not dropout and (kernel, block_d) in MAX_REGISTERS:
        constexprs["maxnreg"] = MAX_REGISTERS[kernel, block_d]
    return constexprs
