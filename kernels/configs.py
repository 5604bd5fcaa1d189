"""Launch configurations: the tile, the warps and the stages that each kernel is launched with.

``TABLE`` is data: key → configuration. Of the lines that fit a launch, ``lookup`` takes the first
in this order; each rule decides among those that the rules before it leave:

1. all options of the launch, then all but the last, and so on down to none;
2. its architecture class, then "gpu" (not in the interpreter), then ``ANY``;
3. its dtype class, then ``ANY``;
4. its size class, then ``ANY``;
5. its kernel, then ``ANY``.

All lines were chosen by ahead-of-time compilation (``python setup.py build_kernels``): no spilled
register on any architecture of the class, and the most work per program. They are predicted, not
measured, but for those that a comment calls measured: there on an H200 with GPT-2 124M's sizes, 32
sequences of 1024 tokens, bfloat16 (``bench/results/h200``).

On a GPU that ``fastgpt tune`` has measured, its own lines come before all of these: ``tuned``.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastgpt.kernels import _host, tuned_table

ANY = "any"
CUDNN = "cuDNN"  # in place of the attention kernel where PyTorch's cuDNN takes the inputs
CUBLAS = "cuBLAS"  # in place of a configuration: PyTorch's product, the epilogue in its own kernel


class Key(NamedTuple):
    """``arch``: "sm_90" (H100, H200), "sm_100" (B200), "sm_80" (other GPUs: 8.0, 8.6, 8.9, 12.0),
    "gpu" or "interpreter". ``dtype``: "half" (float16, bfloat16), "float32", "float64". ``size``:
    what the kernel's tile spans, rounded up to a power of two. ``options``: in a fixed order."""

    op: str
    kernel: str
    arch: str = ANY
    dtype: str = ANY
    size: int | str = ANY
    options: tuple[str, ...] = ()


# What a kernel is launched with, by its argument's name. Not passed are fields that are None, and
# ``programs``, which the host function needs: how many programs share a multiprocessor.


class Attention(NamedTuple):
    """``BLOCK_M`` queries, ``BLOCK_N`` keys; ``maxnreg``: registers that a thread may have."""

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
    """``GROUP``: tiles down before the next column."""

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
    """A program walks down its columns; ``STAGES - 1`` tiles are loaded while one is computed."""

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

# Two programs share a multiprocessor with 128 registers a thread. The loop needs no more, but
# without a limit ptxas takes more for the masked tiles. Triton 3.9's code spills under the limit,
# and takes no more than 128 without it.
_LIMIT = 128 if triton.__version__.startswith("3.6.") else None

TABLE: dict[Key, Any] = {
    # Attention; size: of a head. Philox, document borders and lengths take registers: where one
    # of them needs another tile, it has a line of its own.
    Key("attention", ANY, "interpreter"): Attention(64, 64, 4, 1),
    Key("attention", "fwd", "interpreter", "half"): Attention(64, 64, 4, 1, True),
    # sm_90: wgmma reads its operands from shared memory, of which there is 227 KB. Its softmax
    # overlaps with P V only if that is pipelined; on sm_100 Triton sees to it.
    Key("attention", "fwd", "sm_90", "half", 16): Attention(128, 64, 4, 3, True),
    Key("attention", "fwd", "sm_90", "half", 16, _DROPOUT): Attention(64, 64, 4, 3, True),
    Key("attention", "fwd", "sm_90", "half", 32): Attention(128, 64, 4, 3, True),
    Key("attention", "fwd", "sm_90", "half", 32, _DROPOUT): Attention(64, 64, 4, 2, True),
    Key("attention", "fwd", "sm_90", "half", 64): Attention(128, 64, 8, 3, True, _LIMIT),
    Key("attention", "fwd", "sm_90", "half", 64, _DOCUMENTS): Attention(
        128, 64, 8, 2, True, _LIMIT
    ),
    Key("attention", "fwd", "sm_90", "half", 64, _DROPOUT): Attention(64, 64, 4, 3, True),
    Key("attention", "fwd", "sm_90", "half", 128): Attention(128, 64, 8, 2, True),
    Key("attention", "fwd", "sm_90", "half", 128, _DROPOUT): Attention(64, 32, 4, 2, True),
    Key("attention", "fwd", "sm_90", "half", 256): Attention(64, 32, 8, 2, True),
    Key("attention", "fwd_library"): None,
    Key("attention", "fwd_library", "sm_90", "half", 64): CUDNN,
    # Measured: both backward kernels together 1.07 and 1.03 times as fast as with 64 x 64.
    Key("attention", "bwd_dq", "sm_90", "half", 64): Attention(64, 32, 4, 3),
    Key("attention", "bwd_dkdv", "sm_90", "half", 64): Attention(32, 64, 4, 3),
    # sm_100: tcgen05 sums in tensor memory, 128 rows for four warps.
    Key("attention", "fwd", "sm_100", "half", 64): Attention(128, 64, 4, 3),
    Key("attention", "bwd_dq", "sm_100", "half", 64): Attention(128, 64, 4, 2),
    Key("attention", "bwd_dq", "sm_100", "half", 64, _DROPOUT): Attention(64, 64, 4, 3),
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
    # Half precision where an architecture has no line of its own.
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
    Key("attention", "bwd_dq", "gpu", "half", 64): Attention(64, 64, 4, 3),
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
    Key("attention", "bwd_dkdv", "gpu", "float32", 32, _BOTH): Attention(32, 32, 8, 1),
    Key("attention", "bwd_dkdv", "gpu", "float32", 64): Attention(32, 32, 8, 1),
    Key("attention", "bwd_dkdv", "gpu", "float32", 64, _LENGTHS): Attention(16, 32, 8, 1),
    Key("attention", "bwd_dkdv", "gpu", "float32", 64, _DROPOUT): Attention(16, 16, 8, 1),
    Key("attention", "bwd_dkdv", "gpu", "float32", 64, (*_DROPOUT, *_LENGTHS)): Attention(
        16, 32, 8, 1
    ),
    Key("attention", "bwd_dkdv", "gpu", "float32", 128): Attention(16, 16, 4, 1),
    Key("attention", "bwd_dkdv", "gpu", "float32", 256): Attention(16, 16, 8, 1),
    # Decoding; size: of a head. K and V of a part lie in registers: 64 of a thread's 255 where
    # elements have two bytes.
    Key("attention_decode", "fwd", size=16): AttentionDecode(128, 4),
    Key("attention_decode", "fwd", size=32): AttentionDecode(128, 4),
    Key("attention_decode", "fwd", size=64): AttentionDecode(64, 4),
    Key("attention_decode", "fwd", size=128): AttentionDecode(64, 8),
    Key("attention_decode", "fwd", size=256): AttentionDecode(32, 8),
    Key("attention_decode", "sum"): AttentionDecodeSum(8, 4),
    # Products with an epilogue; size: of the longest row of the two operands. Two programs or more
    # on a multiprocessor: one computes its epilogue while another multiplies. Of 4 and 8 warps,
    # those that issue fewer instructions a tile: on sm_90 and K = 768, 4100 to 4200 cycles beside
    # 6144 of the tensor cores with 4, 5400 to 5500 with 8. cuBLAS has float32: its TF32 kernels are
    # as good, and beside IEEE products there is no epilogue to hide.
    Key("gemm", ANY, "interpreter"): Gemm(64, 64, 64, 4, 1, 1),
    Key("gemm", "sum_parts", "interpreter"): Tile(8, 64, 4),
    Key("gemm", "sum_tiles", "interpreter"): Tile(8, 64, 4),
    Key("gemm", ANY, "gpu", "float32"): CUBLAS,
    # Parts of a weight gradient, few and long; sums of dpre, one for each row of tiles.
    Key("gemm", "sum_parts", "gpu"): Tile(8, 512, 4),
    Key("gemm", "sum_tiles", "gpu"): Tile(128, 16, 4),
    Key("gemm", "sum_tiles", "gpu", "float32"): Tile(128, 16, 4),  # behind cuBLAS
    # sm_90 and sm_100: tiles come by TMA.
    Key("gemm", "fwd", "gpu", "half"): Gemm(128, 128, 64, 4, 3, 2),
    Key("gemm", "bwd", "gpu", "half"): Gemm(128, 128, 64, 4, 3, 2),
    Key("gemm", "bwd", "gpu", "half", ANY, ("recompute",)): Gemm(128, 64, 64, 4, 4, 2),
    Key("gemm", "weight", "gpu", "half"): Gemm(128, 128, 64, 4, 3, 2),
    # Measured: GELU in a kernel of its own behind cuBLAS is 1.06 times as fast (1.01 times with 8
    # warps); cuBLAS 1.15 times where no bias is summed, 0.93 times where one is.
    Key("gemm", "fwd", "sm_90", "half"): CUBLAS,
    Key("gemm", "weight", "sm_90", "half"): CUBLAS,
    Key("gemm", "weight", "sm_90", "half", ANY, ("bias",)): Gemm(128, 256, 64, 8, 4, 1),
    # sm_80: by cp.async, and accumulators live in registers.
    Key("gemm", "fwd", "sm_80", "half"): Gemm(64, 128, 32, 4, 3, 3),
    Key("gemm", "bwd", "sm_80", "half"): Gemm(64, 128, 32, 4, 3, 3),
    Key("gemm", "bwd", "sm_80", "half", ANY, ("recompute",)): Gemm(128, 64, 32, 4, 3, 3),
    Key("gemm", "weight", "sm_80", "half"): Gemm(128, 128, 32, 8, 3, 2),
    # LayerNorm; size: of a row, 32 or more. 8 to 32 elements a thread; a tile of the backward also
    # keeps the sums of the parameters' gradients. "bwd_narrow": for rows beside which these no
    # longer fit into the registers.
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
    # Measured, with the residual sum: 1.28 times as fast as the line of all GPUs.
    Key("layer_norm", "bwd", "sm_90", "half", 1024): RowLoop(1, 2, 3, 6),
    Key("layer_norm", "bwd_narrow"): Tile(8, 128, 4),
    Key("layer_norm", "sum_row_blocks"): Tile(128, 16, 4),
    # Rows of the loss; size: classes, 256 or more. 8 elements a thread are one 16-byte load in half
    # precision. 4 rows of 512 threads fill a multiprocessor, while the rows under way (40 MB of
    # GPT-2's in half precision) still fit into the L2 cache of sm_90.
    Key("cross_entropy", "rows"): PartOfRow(4096, 16),
    Key("cross_entropy", "scale"): Elementwise(1024, 4),
    Key("cross_entropy", "rows", size=256): PartOfRow(256, 1),
    Key("cross_entropy", "rows", size=512): PartOfRow(512, 2),
    Key("cross_entropy", "rows", size=1024): PartOfRow(1024, 4),
    Key("cross_entropy", "rows", size=2048): PartOfRow(2048, 8),
    # Embedding; size: of a row, 32 or more. Forward and position: 16 elements a thread, in columns
    # that divide GPT-2's widths. Token: most runs are short, so few programs with long rows.
    Key("embedding", "fwd"): Tile(16, 128, 4),
    Key("embedding", "bwd_position"): Tile(16, 128, 4),
    Key("embedding", "bwd_token"): Tile(4, 1024, 4),
    Key("embedding", "bwd_token", size=32): Tile(16, 32, 4),
    Key("embedding", "bwd_token", size=64): Tile(16, 64, 4),
    Key("embedding", "bwd_token", size=128): Tile(16, 128, 4),
    Key("embedding", "bwd_token", size=256): Tile(16, 256, 4),
    Key("embedding", "bwd_token", size=512): Tile(8, 512, 4),
    # Eight elements a thread: 16-byte accesses in half precision, two of them in float32.
    Key("gelu", ANY): Elementwise(1024, 4),
    # No tiles ahead in float32: erf branches, and a copy's barrier must not lie behind a branch.
    Key("gelu", "bwd_rows"): TileLoop(8, 128, 4),
    Key("gelu", "bwd_rows", dtype="half"): TileLoop(8, 128, 2, 2),
    Key("adamw", "update"): Elementwise(1024, 4),
    # fp8: a tile is 8 KB, whose rows and columns both fill sectors of memory; 16 programs hold
    # enough loads under way. "amax" finds the largest magnitude.
    Key("fp8", "quantise"): Tile(64, 128, 4),
    Key("fp8", "transpose"): Tile(64, 128, 4),
    Key("fp8", "amax"): Reduction(4096, 8, 8),
}


@functools.cache
def architecture(capability: int | None) -> str:
    """The class of a compute capability (80, 90, ...); None: the interpreter."""
    if capability is None:
        return "interpreter"
    if 100 <= capability < 120:
        return "sm_100"
    return "sm_90" if capability == 90 else "sm_80"


@functools.cache
def dtype_class(dtype: torch.dtype) -> str:
    """As ``Key`` has it."""
    return "half" if _host.is_half(dtype) else str(dtype).removeprefix("torch.")


def first_line(
    table: Mapping[Key, Any],
    op: str,
    kernel: str,
    capability: int | None,
    dtype: torch.dtype,
    size: int | str = ANY,
    options: tuple[str, ...] = (),
) -> Any:
    """The line of a table for a launch, by the order that stands above.

    Raises:
        KeyError: there is no line for it.
    """
    own = architecture(capability)
    for chosen, arch, of_dtype, of_size, of_kernel in itertools.product(
        [options[:n] for n in range(len(options), -1, -1)],
        (own, ANY) if capability is None else (own, "gpu", ANY),
        (dtype_class(dtype), ANY),
        (size, ANY),
        (kernel, ANY),
    ):
        key = Key(op, of_kernel, arch, of_dtype, of_size, chosen)
        if key in table:
            return table[key]
    raise KeyError((op, kernel, capability, dtype, size, options))


@functools.cache
def lookup(
    op: str,
    kernel: str,
    capability: int | None,
    dtype: torch.dtype,
    size: int | str = ANY,
    options: tuple[str, ...] = (),
) -> Any:
    """The configuration of a launch in ``TABLE``. Raises KeyError as ``first_line``."""
    return first_line(TABLE, op, kernel, capability, dtype, size, options)


# Lines that were measured on a GPU, by its index, with the exact keys of its launches. None stands
# for the interpreter: it has lines only where a test, or the tuner, puts some there.
_TUNED: dict[int | None, dict[Key, Any]] = {None: {}}
_UNKNOWN = object()  # None is a configuration


def tuned(device: torch.device) -> dict[Key, Any]:
    """The lines that go before ``TABLE`` on the CPU or a GPU, which must have an index. What is
    written to them takes effect with the next launch. A GPU's are read from the file of
    ``fastgpt tune`` at its first launch."""
    index = device.index if device.type == "cuda" else None
    lines = _TUNED.get(index)
    return read_tuned(device) if lines is None else lines


def read_tuned(device: torch.device) -> dict[Key, Any]:
    """``tuned``, read again from the file. One that is damaged, or made elsewhere, is ignored with
    a warning."""
    with tuned_table.notice_of_damage(device):
        lines = {decoded_key(key): decoded(one) for key, one in tuned_table.lines(device)}
        return use_tuned(device, lines)
    return use_tuned(device, {})


def use_tuned(device: torch.device, lines: dict[Key, Any]) -> dict[Key, Any]:
    """Let ``lines`` be ``tuned(device)``."""
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    _TUNED[index if device.type == "cuda" else None] = lines
    return lines


def encoded(config: Any) -> Any:
    """A configuration for a JSON file: a string or None as it is, a named tuple behind its class's
    name."""
    return [type(config).__name__, *config] if isinstance(config, tuple) else config


def decoded(value: Any) -> Any:
    """What ``encoded`` was given. Raises ValueError for anything else."""
    if value is None or isinstance(value, str):
        return value
    name, *values = value
    kind = globals().get(name)
    if not (isinstance(kind, type) and issubclass(kind, tuple) and kind is not Key):
        raise ValueError(f"{name!r} is no kind of configuration")
    return kind(*values)


def decoded_key(value: Any) -> Key:
    """A ``Key`` from the list that a JSON file has of it."""
    return Key._make([*value[:-1], tuple(value[-1])])


def find(x: Tensor, op: str, kernel: str, size: int | str = ANY, *options: str) -> Any:
    """The configuration of a launch whose main operand is ``x``."""
    capability = _host.capability(x.device)
    measured = tuned(x.device)
    if measured:
        # As a key it is equal to a Key, and it is cheaper to make.
        key = op, kernel, architecture(capability), dtype_class(x.dtype), size, options
        found = measured.get(key, _UNKNOWN)  # type: ignore[call-overload]
        if found is not _UNKNOWN:
            return found
    return lookup(op, kernel, capability, x.dtype, size, options)


@functools.lru_cache(maxsize=None, typed=True)  # typed: equal tuples of two kinds are not equal
def launch(config: Any) -> dict[str, Any]:
    """What a configuration gives the kernel. Not to be written to: later launches share it."""
    return {k: v for k, v in config._asdict().items() if v is not None and k != "programs"}
