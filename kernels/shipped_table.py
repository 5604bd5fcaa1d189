"""The shipped launch table: tile, warps and stages of each kernel. It is data, key → configuration;
``configs`` looks it up.

All entries were chosen by ahead-of-time compilation (``python setup.py build_kernels``): no spilled
registers on any architecture of the class, and the most work per program. They are predicted, not
measured, unless a comment says so. Those were measured on an H200 with GPT-2 124M's sizes, 32
sequences of 1024 tokens, in bfloat16 (``bench/results/h200``).
"""

from typing import Any, NamedTuple

import triton

ANY = "any"
CUDNN = "cuDNN"  # use PyTorch's cuDNN attention for the inputs that it supports
CUBLAS = "cuBLAS"  # use PyTorch's matrix product, with the epilogue in a separate kernel


class Key(NamedTuple):
    """``arch``: "sm_90" (H100, H200), "sm_100" (B200), "sm_80" (other GPUs: 8.0, 8.6, 8.9, 12.0),
    "sm_75" (T4, RTX 20), "gpu" or "interpreter". ``dtype``: "half" (float16, bfloat16), "float32",
    "float64". ``size``: the tile's span, rounded up to a power of two. ``options``: always in the
    same order."""

    op: str
    kernel: str
    arch: str = ANY
    dtype: str = ANY
    size: int | str = ANY
    options: tuple[str, ...] = ()


# The fields are the keyword arguments of a launch. A field that is None is not passed, nor is
# ``programs``, the number of programs per multiprocessor, which only the launcher uses.


class Attention(NamedTuple):
    """``BLOCK_M`` queries, ``BLOCK_N`` keys; ``maxnreg``: the limit on registers per thread."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    PIPELINED_PV: bool | None = None
    maxnreg: int | None = None


class AttentionDecode(NamedTuple):
    BLOCK_N: int
    num_warps: int


class AttentionDecodeSum(NamedTuple):
    PARTS: int
    num_warps: int


class Gemm(NamedTuple):
    """``GROUP``: the number of tiles taken down a column before moving to the next."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    programs: int
    GROUP: int = 8


class Tile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


class TileLoop(NamedTuple):
    """A program loops down its columns; ``STAGES - 1`` tiles are loaded while one is computed."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    STAGES: int = 1


class WholeRows(NamedTuple):
    """The tile is as wide as the row."""

    BLOCK_M: int
    num_warps: int


class RowLoop(NamedTuple):
    """The tile is as wide as the row; ``STAGES - 1`` tiles are loaded while one is computed."""

    BLOCK_M: int
    num_warps: int
    STAGES: int
    programs: int


class PartOfRow(NamedTuple):
    """``STAGES - 1`` tiles are loaded while one is computed."""

    BLOCK_N: int
    num_warps: int
    STAGES: int = 1


class Elementwise(NamedTuple):
    BLOCK: int
    num_warps: int


class Reduction(NamedTuple):
    BLOCK: int
    num_warps: int
    programs: int


_DROPOUT, _DOCUMENTS, _BOTH = ("dropout",), ("documents",), ("dropout", "documents")
_LENGTHS = ("lengths",)

# With 128 registers per thread, two programs share a multiprocessor. The main loop needs no more,
# but without a limit ptxas uses more for the masked tiles: about 180 with Triton 3.7 to 3.9. With
# the limit 3.9 spills 24 bytes, which was not measured, so it has no limit. For documents, 3.6
# spills with three stages, 3.7 and 3.8 with two.
_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
_LIMIT = 128 if _TRITON < (3, 9) else None

TABLE: dict[Key, Any] = {
    # Attention; size: of a head. Philox, document boundaries and lengths use registers: if one of
    # them needs another tile, it has its own entry.
    Key("attention", ANY, "interpreter"): Attention(64, 64, 4, 1),
    Key("attention", "fwd", "interpreter", "half"): Attention(64, 64, 4, 1, True),
    # sm_90: wgmma reads its operands from shared memory, of which there is 227 KB. The softmax
    # overlaps with P V only with PIPELINED_PV; on sm_100 Triton arranges that itself.
    Key("attention", "fwd", "sm_90", "half", 16): Attention(128, 64, 4, 3, True),
    Key("attention", "fwd", "sm_90", "half", 16, _DROPOUT): Attention(64, 64, 4, 3, True),
    Key("attention", "fwd", "sm_90", "half", 32): Attention(128, 64, 4, 3, True),
    Key("attention", "fwd", "sm_90", "half", 32, _DROPOUT): Attention(64, 64, 4, 2, True),
    Key("attention", "fwd", "sm_90", "half", 64): Attention(128, 64, 8, 3, True, _LIMIT),
    Key("attention", "fwd", "sm_90", "half", 64, _DOCUMENTS): Attention(
        128, 64, 8, 2 if _TRITON < (3, 7) else 3, True, _LIMIT
    ),
    Key("attention", "fwd", "sm_90", "half", 64, _DROPOUT): Attention(64, 64, 4, 3, True),
    Key("attention", "fwd", "sm_90", "half", 128): Attention(128, 64, 8, 2, True),
    Key("attention", "fwd", "sm_90", "half", 128, _DROPOUT): Attention(64, 32, 4, 2, True),
    Key("attention", "fwd", "sm_90", "half", 256): Attention(64, 32, 8, 2, True),
    Key("attention", "fwd_library"): None,
    Key("attention", "fwd_library", "sm_90", "half", 64): CUDNN,
    # Measured: the two backward kernels are 1.07 and 1.03 times as fast as with 64 x 64.
    Key("attention", "bwd_dq", "sm_90", "half", 64): Attention(64, 32, 4, 3),
    Key("attention", "bwd_dkdv", "sm_90", "half", 64): Attention(32, 64, 4, 3),
    # sm_100: tcgen05 sums in tensor memory, 128 rows for four warps.
    Key("attention", "fwd", "sm_100", "half", 64): Attention(128, 64, 4, 3),
    Key("attention", "bwd_dq", "sm_100", "half", 64): Attention(128, 64, 4, 2),
    Key("attention", "bwd_dq", "sm_100", "half", 64, _DROPOUT): Attention(64, 64, 4, 3),
    Key("attention", "bwd_dkdv", "sm_100", "half", 64, (*_DROPOUT, *_LENGTHS)): Attention(
        32, 64, 8, 2
    ),
    Key("attention", "bwd_dkdv", "sm_100", "half", 128): Attention(64, 64, 4, 2),
    # sm_80: operands pass through registers, and some of these GPUs have 99 KB of shared memory.
    Key("attention", "fwd", "sm_80", "half", 16): Attention(64, 64, 4, 2),
    Key("attention", "fwd", "sm_80", "half", 32): Attention(64, 64, 4, 2),
    Key("attention", "fwd", "sm_80", "half", 64): Attention(128, 64, 8, 3),
    Key("attention", "fwd", "sm_80", "half", 64, _DROPOUT): Attention(64, 32, 4, 2),
    Key("attention", "fwd", "sm_80", "half", 128): Attention(64, 32, 4, 2),
    Key("attention", "fwd", "sm_80", "half", 128, _BOTH): Attention(64, 32, 4, 1),
    Key("attention", "bwd_dq", "sm_80", "half", 16): Attention(64, 32, 4, 2),
    Key("attention", "bwd_dq", "sm_80", "half", 32): Attention(64, 32, 4, 2),
    Key("attention", "bwd_dq", "sm_80", "half", 64): Attention(64, 32, 4, 2),
    Key("attention", "bwd_dq", "sm_80", "half", 64, _DROPOUT): Attention(64, 32, 8, 2),
    Key("attention", "bwd_dq", "sm_80", "half", 128, _DROPOUT): Attention(64, 16, 4, 2),
    Key("attention", "bwd_dq", "sm_80", "half", 256): Attention(32, 32, 8, 1),
    Key("attention", "bwd_dq", "sm_80", "half", 256, _DROPOUT): Attention(32, 32, 8, 1),
    Key("attention", "bwd_dkdv", "sm_80", "half", 64): Attention(32, 128, 8, 2),
    Key("attention", "bwd_dkdv", "sm_80", "half", 64, _DROPOUT): Attention(16, 128, 8, 2),
    Key("attention", "bwd_dkdv", "sm_80", "half", 128): Attention(32, 64, 8, 1),
    Key("attention", "bwd_dkdv", "sm_80", "half", 128, _DROPOUT): Attention(32, 64, 8, 1),
    Key("attention", "bwd_dkdv", "sm_80", "half", 256): Attention(16, 32, 8, 1),
    # Half precision on architectures without an entry of their own.
    Key("attention", "fwd", "gpu", "half", 16): Attention(128, 64, 4, 3),
    Key("attention", "fwd", "gpu", "half", 16, _DROPOUT): Attention(64, 64, 4, 3),
    Key("attention", "fwd", "gpu", "half", 32): Attention(128, 64, 4, 3),
    Key("attention", "fwd", "gpu", "half", 32, _DROPOUT): Attention(64, 64, 4, 2),
    Key("attention", "fwd", "gpu", "half", 64, _DROPOUT): Attention(64, 64, 4, 3),
    Key("attention", "fwd", "gpu", "half", 128): Attention(128, 64, 8, 2),
    Key("attention", "fwd", "gpu", "half", 128, _DROPOUT): Attention(64, 32, 4, 2),
    Key("attention", "fwd", "gpu", "half", 256): Attention(64, 32, 8, 2),
    Key("attention", "bwd_dq", "gpu", "half", 16): Attention(64, 64, 4, 2),
    Key("attention", "bwd_dq", "gpu", "half", 32): Attention(64, 64, 4, 2),
    Key("attention", "bwd_dq", "gpu", "half", 128): Attention(64, 32, 4, 2),
    Key("attention", "bwd_dq", "gpu", "half", 256): Attention(64, 32, 8, 2),
    Key("attention", "bwd_dq", "gpu", "half", 256, _DROPOUT): Attention(64, 16, 8, 2),
    Key("attention", "bwd_dkdv", "gpu", "half", 16): Attention(64, 64, 4, 2),
    Key("attention", "bwd_dkdv", "gpu", "half", 32): Attention(32, 64, 8, 2),
    Key("attention", "bwd_dkdv", "gpu", "half", 64): Attention(64, 64, 4, 3),
    Key("attention", "bwd_dkdv", "gpu", "half", 64, _DROPOUT): Attention(32, 64, 4, 2),
    Key("attention", "bwd_dkdv", "gpu", "half", 128): Attention(32, 128, 8, 2),
    Key("attention", "bwd_dkdv", "gpu", "half", 128, _DROPOUT): Attention(16, 128, 8, 2),
    Key("attention", "bwd_dkdv", "gpu", "half", 256): Attention(16, 32, 4, 1),
    Key("attention", "bwd_dkdv", "gpu", "half", 256, _DROPOUT): Attention(16, 32, 8, 1),
    # float32: IEEE products are FMAs from registers; TF32 fits wherever they do.
    Key("attention", "fwd", "gpu", "float32", 16): Attention(32, 32, 4, 1),
    Key("attention", "fwd", "gpu", "float32", 16, _BOTH): Attention(32, 16, 4, 1),
    Key("attention", "fwd", "gpu", "float32", 32): Attention(32, 32, 4, 1),
    Key("attention", "fwd", "gpu", "float32", 32, _DROPOUT): Attention(32, 16, 4, 2),
    Key("attention", "fwd", "gpu", "float32", 64): Attention(64, 32, 8, 1),
    Key("attention", "fwd", "gpu", "float32", 64, _DROPOUT): Attention(16, 16, 8, 1),
    Key("attention", "fwd", "gpu", "float32", 128): Attention(16, 16, 4, 1),
    Key("attention", "fwd", "gpu", "float32", 128, _DOCUMENTS): Attention(32, 16, 8, 1),
    Key("attention", "fwd", "gpu", "float32", 128, _DROPOUT): Attention(16, 16, 4, 2),
    Key("attention", "fwd", "gpu", "float32", 128, _BOTH): Attention(16, 16, 4, 1),
    Key("attention", "fwd", "gpu", "float32", 256): Attention(16, 16, 8, 1),
    Key("attention", "fwd", "gpu", "float32", 256, _DROPOUT): Attention(32, 16, 8, 2),
    Key("attention", "bwd_dq", "gpu", "float32", 16): Attention(32, 32, 4, 1),
    Key("attention", "bwd_dq", "gpu", "float32", 32): Attention(32, 32, 4, 1),
    Key("attention", "bwd_dq", "gpu", "float32", 32, _DOCUMENTS): Attention(32, 32, 4, 2),
    Key("attention", "bwd_dq", "gpu", "float32", 64): Attention(32, 32, 8, 1),
    Key("attention", "bwd_dq", "gpu", "float32", 128): Attention(16, 16, 8, 1),
    Key("attention", "bwd_dq", "gpu", "float32", 256): Attention(16, 16, 8, 2),
    Key("attention", "bwd_dkdv", "gpu", "float32", 16): Attention(32, 64, 8, 1),
    Key("attention", "bwd_dkdv", "gpu", "float32", 16, _DROPOUT): Attention(16, 32, 8, 1),
    Key("attention", "bwd_dkdv", "gpu", "float32", 32): Attention(32, 64, 8, 1),
    Key("attention", "bwd_dkdv", "gpu", "float32", 32, _DROPOUT): Attention(32, 32, 8, 1),
    Key("attention", "bwd_dkdv", "gpu", "float32", 64): Attention(32, 32, 8, 1),
    Key("attention", "bwd_dkdv", "gpu", "float32", 64, _LENGTHS): Attention(16, 32, 8, 1),
    Key("attention", "bwd_dkdv", "gpu", "float32", 64, _DROPOUT): Attention(16, 16, 8, 1),
    Key("attention", "bwd_dkdv", "gpu", "float32", 128): Attention(16, 16, 4, 1),
    Key("attention", "bwd_dkdv", "gpu", "float32", 256): Attention(16, 16, 8, 1),
    # Decoding; size: of a head. K and V of a part are in registers: with 2-byte elements they take
    # 64 of a thread's 255.
    Key("attention_decode", "fwd", size=16): AttentionDecode(128, 4),
    Key("attention_decode", "fwd", size=32): AttentionDecode(128, 4),
    Key("attention_decode", "fwd", size=64): AttentionDecode(64, 4),
    Key("attention_decode", "fwd", size=128): AttentionDecode(64, 8),
    Key("attention_decode", "fwd", size=256): AttentionDecode(32, 8),
    Key("attention_decode", "sum"): AttentionDecodeSum(8, 4),
    # Products with an epilogue; size: of the longest row of the two operands. Two or more programs
    # share a multiprocessor, so that one computes its epilogue while another multiplies. Of 4 and 8
    # warps, the choice is the one that issues fewer instructions per tile: on sm_90 with K = 768,
    # 4100 to 4200 cycles with 4 and 5400 to 5500 with 8, next to 6144 of the tensor cores. float32
    # uses cuBLAS: its TF32 kernels are as good, and an epilogue is negligible in IEEE products.
    Key("gemm", ANY, "interpreter"): Gemm(64, 64, 64, 4, 1, 1),
    Key("gemm", "sum_parts", "interpreter"): Tile(8, 64, 4),
    Key("gemm", "sum_tiles", "interpreter"): Tile(8, 64, 4),
    Key("gemm", ANY, "gpu", "float32"): CUBLAS,
    # sum_parts: few long parts of a weight gradient. sum_tiles: sums of dpre, one per row of tiles.
    Key("gemm", "sum_parts", "gpu"): Tile(8, 512, 4),
    Key("gemm", "sum_tiles", "gpu"): Tile(128, 16, 4),
    Key("gemm", "sum_tiles", "gpu", "float32"): Tile(128, 16, 4),  # after cuBLAS
    # sm_90 and sm_100: tiles are copied by TMA.
    Key("gemm", "fwd", "gpu", "half"): Gemm(128, 128, 64, 4, 3, 2),
    Key("gemm", "bwd", "gpu", "half"): Gemm(128, 128, 64, 4, 3, 2),
    Key("gemm", "bwd", "gpu", "half", ANY, ("recompute",)): Gemm(128, 64, 64, 4, 4, 2),
    Key("gemm", "weight", "gpu", "half"): Gemm(128, 128, 64, 4, 3, 2),
    # Measured: cuBLAS with a separate GELU kernel is 1.06 times as fast (1.01 times with 8 warps).
    # For the weight gradient, cuBLAS is 1.15 times as fast without a bias sum, 0.93 times with one.
    Key("gemm", "fwd", "sm_90", "half"): CUBLAS,
    Key("gemm", "weight", "sm_90", "half"): CUBLAS,
    Key("gemm", "weight", "sm_90", "half", ANY, ("bias",)): Gemm(128, 256, 64, 8, 4, 1),
    # sm_80: tiles are copied by cp.async, and accumulators are in registers.
    Key("gemm", "fwd", "sm_80", "half"): Gemm(64, 128, 32, 4, 3, 3),
    Key("gemm", "bwd", "sm_80", "half"): Gemm(64, 128, 32, 4, 3, 3),
    Key("gemm", "bwd", "sm_80", "half", ANY, ("recompute",)): Gemm(128, 64, 32, 4, 3, 3),
    Key("gemm", "weight", "sm_80", "half"): Gemm(128, 128, 32, 8, 3, 2),
    # sm_75: Triton does not use its tensor cores.
    Key("gemm", "fwd", "sm_75", "half"): CUBLAS,
    Key("gemm", "bwd", "sm_75", "half"): CUBLAS,
    Key("gemm", "bwd", "sm_75", "half", ANY, ("recompute",)): CUBLAS,
    Key("gemm", "weight", "sm_75", "half"): CUBLAS,
    # LayerNorm; size: of a row, 32 or more. 8 to 32 elements per thread; a backward tile also
    # accumulates parameter gradients. "bwd_narrow": for rows so wide that these exceed registers.
    Key("layer_norm", "fwd"): WholeRows(8, 4),
    Key("layer_norm", "fwd", size=1024): WholeRows(4, 4),
    Key("layer_norm", "fwd", "sm_80", size=1024): WholeRows(2, 4),
    Key("layer_norm", "fwd", size=2048): WholeRows(2, 8),
    Key("layer_norm", "fwd", size=4096): WholeRows(1, 16),
    Key("layer_norm", "fwd", size=8192): WholeRows(1, 16),
    Key("layer_norm", "fwd", size=16384): WholeRows(1, 16),
    Key("layer_norm", "bwd"): WholeRows(4, 4),
    Key("layer_norm", "bwd", size=1024): WholeRows(2, 4),
    Key("layer_norm", "bwd", size=2048): WholeRows(1, 4),
    Key("layer_norm", "bwd", size=4096): WholeRows(1, 8),
    Key("layer_norm", "bwd", size=8192): WholeRows(1, 16),
    Key("layer_norm", "bwd", size=16384): WholeRows(1, 16),
    # Measured, with the residual sum: 1.28 times as fast as the entry for all GPUs.
    Key("layer_norm", "bwd", "sm_90", "half", 1024): RowLoop(1, 2, 3, 6),
    Key("layer_norm", "bwd_narrow"): Tile(8, 128, 4),
    Key("layer_norm", "sum_row_blocks"): Tile(128, 16, 4),
    # The interpreter takes a millisecond per program, whatever its size.
    Key("layer_norm", "sum_row_blocks", "interpreter"): Tile(64, 256, 4),
    # Rows of the loss; size: classes, 256 or more. 8 elements per thread are one 16-byte load in
    # half precision. 4 rows of 512 threads fill a multiprocessor, and the rows in flight (40 MB of
    # GPT-2's in half precision) still fit in the L2 cache of sm_90.
    Key("cross_entropy", "rows"): PartOfRow(4096, 16),
    Key("cross_entropy", "scale"): Elementwise(1024, 4),
    Key("cross_entropy", "rows", size=256): PartOfRow(256, 1),
    Key("cross_entropy", "rows", size=512): PartOfRow(512, 2),
    Key("cross_entropy", "rows", size=1024): PartOfRow(1024, 4),
    Key("cross_entropy", "rows", size=2048): PartOfRow(2048, 8),
    # Embedding; size: of a row, 32 or more. Forward and position: 16 elements per thread; BLOCK_N
    # divides GPT-2's widths. Token: most runs of equal ids are short: few programs, long rows.
    Key("embedding", "fwd"): Tile(16, 128, 4),
    Key("embedding", "bwd_position"): Tile(16, 128, 4),
    Key("embedding", "bwd_position", "interpreter"): Tile(16, 512, 4),
    Key("embedding", "bwd_token"): Tile(4, 1024, 4),
    Key("embedding", "bwd_token", size=32): Tile(16, 32, 4),
    Key("embedding", "bwd_token", size=64): Tile(16, 64, 4),
    Key("embedding", "bwd_token", size=128): Tile(16, 128, 4),
    Key("embedding", "bwd_token", size=256): Tile(16, 256, 4),
    Key("embedding", "bwd_token", size=512): Tile(8, 512, 4),
    # Eight elements per thread: one 16-byte access in half precision, two in float32.
    Key("gelu", ANY): Elementwise(1024, 4),
    # No prefetch in float32: erf branches, and a copy's barrier must not follow a branch.
    Key("gelu", "bwd_rows"): TileLoop(8, 128, 4),
    Key("gelu", "bwd_rows", dtype="half"): TileLoop(8, 128, 2, 2),
    Key("adamw", ANY): Elementwise(1024, 4),
    # fp8: a tile is 8 KB, and its rows and columns both fill memory sectors; 16 programs keep
    # enough loads in flight. "amax" finds the largest magnitude.
    Key("fp8", "quantise"): Tile(64, 128, 4),
    Key("fp8", "transpose"): Tile(64, 128, 4),
    Key("fp8", "amax"): Reduction(4096, 8, 8),
}
