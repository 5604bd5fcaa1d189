"""The configurations that ``fastgpt tune`` tries instead of an entry of ``configs.TABLE``: key →
configurations, two to eight including that entry.

The key for a launch is found as in ``configs``. A launch without one keeps its entry in ``TABLE``,
for example in float32 all but those of LayerNorm, the embedding and the loss. A configuration may
be any hashable value that the launcher understands; ``configs.encoded`` requires a string, None or
a named tuple of ``configs``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastgpt.kernels.configs import first_entry, lookup
from fastgpt.kernels.shipped_table import (
    _DOCUMENTS,
    _DROPOUT,
    _LIMIT,
    ANY,
    CUBLAS,
    CUDNN,
    Attention,
    Elementwise,
    Gemm,
    Key,
    PartOfRow,
    RowLoop,
    Tile,
    TileLoop,
    WholeRows,
)


def _each(kind: Callable[..., Any], *lines: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(kind(*line) for line in lines)


_attention = partial(_each, Attention)


_PRODUCT = (
    Gemm(128, 128, 64, 4, 3, 2),
    Gemm(128, 128, 64, 8, 3, 2),
    Gemm(128, 128, 64, 8, 3, 2, 4),
    Gemm(128, 256, 64, 8, 3, 1),
    Gemm(256, 128, 64, 8, 3, 1),
    CUBLAS,
)
_PRODUCT_GRADIENT = (
    Gemm(128, 128, 64, 4, 3, 2),
    Gemm(128, 64, 64, 4, 4, 2),
    Gemm(128, 256, 64, 8, 3, 1),
    Gemm(256, 128, 64, 8, 3, 1),
    CUBLAS,
)
_PRODUCT_RECOMPUTE = (
    Gemm(128, 64, 64, 4, 4, 2),
    Gemm(128, 64, 64, 8, 4, 2),
    Gemm(128, 128, 64, 8, 3, 1),
    CUBLAS,
)
_WEIGHT = (
    Gemm(128, 128, 64, 4, 3, 2),
    Gemm(128, 128, 64, 8, 3, 2),
    Gemm(128, 256, 64, 8, 3, 1),
    Gemm(128, 256, 64, 8, 4, 1),
    Gemm(256, 128, 64, 8, 4, 1),
    CUBLAS,
)
_PRODUCT_80 = (
    Gemm(64, 128, 32, 4, 3, 3),
    Gemm(128, 64, 32, 4, 3, 3),
    Gemm(128, 128, 32, 8, 3, 2),
    Gemm(128, 128, 32, 8, 4, 1),
    Gemm(64, 128, 64, 4, 3, 2),
    CUBLAS,
)
_WEIGHT_80 = (
    Gemm(128, 128, 32, 8, 3, 2),
    Gemm(128, 128, 32, 4, 3, 2),
    Gemm(64, 128, 32, 4, 3, 3),
    Gemm(128, 256, 32, 8, 3, 1),
    CUBLAS,
)

_BLOCKS = _each(Elementwise, (1024, 4), (512, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8))

CANDIDATES: dict[Key, tuple[Any, ...]] = {
    # Attention on sm_90.
    Key("attention", "fwd", "sm_90", "half", 64): _attention(
        (128, 64, 8, 3, True, _LIMIT),
        (128, 64, 8, 3, None, _LIMIT),
        (64, 64, 4, 3, True),
        (64, 64, 4, 3),
        (64, 32, 4, 3, True),
    ),
    Key("attention", "fwd", "sm_90", "half", 64, _DOCUMENTS): _attention(
        (128, 64, 8, 2, True, _LIMIT),
        (64, 64, 4, 3, True),
        (64, 64, 4, 3),
        (64, 32, 4, 3, True),
    ),
    Key("attention", "fwd", "sm_90", "half", 64, _DROPOUT): _attention(
        (64, 64, 4, 3, True),
        (64, 64, 4, 2, True),
        (64, 64, 4, 3),
        (64, 32, 4, 3, True),
        (64, 32, 4, 2),
    ),
    Key("attention", "fwd", "sm_90", "half", 128): _attention(
        (128, 64, 8, 2, True),
        (128, 64, 8, 3, True),
        (128, 64, 8, 2),
        (64, 32, 4, 2, True),
        (64, 32, 4, 3, True),
    ),
    Key("attention", "fwd", "sm_90", "half", 128, _DROPOUT): _attention(
        (64, 32, 4, 2, True),
        (64, 32, 4, 3, True),
        (128, 64, 8, 2, True),
        (64, 64, 8, 2, True),
    ),
    Key("attention", "fwd", "sm_90", "half", 32): _attention(
        (128, 64, 4, 3, True),
        (128, 64, 8, 3, True),
        (64, 64, 4, 3, True),
        (64, 64, 4, 2, True),
        (128, 128, 8, 2, True),
    ),
    # Attention elsewhere, and by cuDNN.
    Key("attention", "fwd_library", "gpu", "half", 64): (None, CUDNN),
    Key("attention", "fwd_library", "gpu", "half", 128): (None, CUDNN),
    Key("attention", "fwd", "gpu", "half", 32): _attention(
        (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)
    ),
    Key("attention", "fwd", "gpu", "half", 64): _attention(
        (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3)
    ),
    Key("attention", "fwd", "gpu", "half", 128): _attention(
        (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2)
    ),
    Key("attention", "bwd_dq", "gpu", "half", 32): _attention(
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2)
    ),
    Key("attention", "bwd_dq", "gpu", "half", 64): _attention(
        (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2), (128, 32, 8, 3)
    ),
    Key("attention", "bwd_dq", "gpu", "half", 128): _attention(
        (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 8, 2), (128, 32, 8, 2), (64, 16, 4, 2)
    ),
    Key("attention", "bwd_dkdv", "gpu", "half", 32): _attention(
        (32, 64, 8, 2), (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)
    ),
    Key("attention", "bwd_dkdv", "gpu", "half", 64): _attention(
        (64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 2), (64, 128, 8, 3)
    ),
    Key("attention", "bwd_dkdv", "gpu", "half", 64, _DROPOUT): _attention(
        (32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 8, 2), (16, 64, 4, 2), (32, 128, 8, 2)
    ),
    Key("attention", "bwd_dkdv", "gpu", "half", 128): _attention(
        (32, 128, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2), (16, 128, 8, 2), (16, 64, 4, 2)
    ),
    Key("attention", "bwd_dkdv", "gpu", "half", 128, _DROPOUT): _attention(
        (16, 128, 8, 2), (16, 64, 4, 2), (16, 64, 4, 3), (32, 64, 8, 2)
    ),
    # On sm_80 operands pass through registers: use smaller tiles or more warps.
    Key("attention", "fwd", "sm_80", "half", 64): _attention(
        (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 8, 3)
    ),
    Key("attention", "fwd", "sm_80", "half", 128): _attention(
        (64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)
    ),
    Key("attention", "bwd_dq", "sm_80", "half", 64): _attention(
        (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2)
    ),
    Key("attention", "bwd_dkdv", "sm_80", "half", 64): _attention(
        (32, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2)
    ),
    Key("attention", "bwd_dkdv", "sm_80", "half", 64, _DROPOUT): _attention(
        (32, 128, 8, 2), (32, 64, 8, 2), (16, 64, 4, 2)
    ),
    Key("attention", "bwd_dkdv", "sm_80", "half", 128): _attention(
        (32, 64, 8, 1), (32, 64, 8, 2), (32, 64, 4, 1), (16, 64, 4, 2), (16, 128, 8, 1)
    ),
    # Products. On sm_80 accumulators are in registers.
    Key("gemm", "fwd", "gpu", "half"): _PRODUCT,
    Key("gemm", "bwd", "gpu", "half"): _PRODUCT_GRADIENT,
    Key("gemm", "bwd", "gpu", "half", ANY, ("recompute",)): _PRODUCT_RECOMPUTE,
    Key("gemm", "weight", "gpu", "half"): _WEIGHT,
    Key("gemm", "fwd", "sm_80", "half"): _PRODUCT_80,
    Key("gemm", "bwd", "sm_80", "half"): _PRODUCT_80,
    Key("gemm", "weight", "sm_80", "half"): _WEIGHT_80,
    **{Key("gemm", kernel, "sm_75", "half"): (CUBLAS,) for kernel in ("fwd", "bwd", "weight")},
    Key("gemm", "bwd", "sm_75", "half", ANY, ("recompute",)): (CUBLAS,),
    # Row kernels: LayerNorm and the loss.
    Key("layer_norm", "fwd"): _each(WholeRows, (8, 4), (4, 4), (4, 2), (2, 2), (16, 4)),
    Key("layer_norm", "fwd", size=1024): _each(WholeRows, (4, 4), (8, 4), (2, 2), (1, 2), (2, 4)),
    Key("layer_norm", "fwd", size=2048): _each(WholeRows, (2, 8), (1, 4), (2, 4), (4, 8), (1, 8)),
    Key("layer_norm", "fwd", size=4096): _each(WholeRows, (1, 16), (1, 8), (1, 4), (2, 8)),
    Key("layer_norm", "bwd"): _each(WholeRows, (4, 4), (2, 2))
    + _each(RowLoop, (4, 4, 3, 3), (2, 2, 3, 6), (4, 2, 3, 4)),
    Key("layer_norm", "bwd", size=1024): _each(WholeRows, (2, 4))
    + _each(RowLoop, (1, 2, 3, 6), (1, 2, 2, 6), (1, 4, 3, 6), (2, 4, 3, 3), (1, 4, 2, 8)),
    Key("layer_norm", "bwd", size=2048): _each(WholeRows, (1, 4))
    + _each(RowLoop, (1, 4, 3, 3), (1, 4, 2, 4), (1, 8, 3, 2), (1, 8, 3, 3)),
    Key("layer_norm", "bwd", size=4096): _each(WholeRows, (1, 8), (1, 16))
    + _each(RowLoop, (1, 8, 2, 2), (1, 8, 3, 2), (1, 16, 2, 1)),
    Key("cross_entropy", "rows"): _each(
        PartOfRow, (4096, 16), (4096, 16, 2), (4096, 8), (2048, 8, 3), (2048, 8), (8192, 16)
    ),
    Key("cross_entropy", "rows", size=256): _each(PartOfRow, (256, 1), (256, 2), (256, 4)),
    # Elementwise kernels.
    Key("embedding", "fwd"): _each(
        Tile, (16, 128, 4), (8, 256, 4), (32, 128, 8), (8, 128, 4), (4, 1024, 8)
    ),
    Key("embedding", "bwd_position"): _each(
        Tile, (16, 128, 4), (8, 128, 4), (32, 64, 4), (8, 256, 4)
    ),
    Key("embedding", "bwd_token", size=1024): _each(
        Tile, (4, 1024, 4), (8, 1024, 8), (4, 1024, 8), (4, 512, 4), (2, 1024, 4)
    ),
    Key("gelu", "fwd"): _BLOCKS,
    Key("gelu", "bwd_rows", dtype="half"): _each(
        TileLoop,
        (8, 128, 2),
        (8, 128, 4),
        (16, 128, 4),
        (4, 256, 2),
        (8, 128, 2, 2),
        (8, 128, 2, 3),
    ),
    Key("cross_entropy", "scale"): _BLOCKS,
    Key("adamw", "update"): _BLOCKS,
}


def candidates(
    op: str,
    kernel: str,
    capability: int | None,
    dtype: torch.dtype,
    size: int | str = ANY,
    options: tuple[str, ...] = (),
) -> list[Any]:
    """The candidates for a launch: first its entry of ``TABLE``, then the alternatives, if any.
    Same arguments as ``configs.lookup``."""
    asked = op, kernel, capability, dtype, size, options
    present = lookup(*asked)
    try:
        others = first_entry(CANDIDATES, *asked)
    except KeyError:
        return [present]
    return [present, *(one for one in others if not same(one, present))]


def same(a: Any, b: Any) -> bool:
    """Equal and of the same class: named tuples of two classes may compare equal."""
    return type(a) is type(b) and a == b
