"""The figures of ``bench_<op>.py`` as tables."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table

# Ways to take a matrix product, providers of ``_product_bench.py``.
ALONE, SEPARATE, FUSED = "cuBLAS alone", "cuBLAS, then passes", "Triton"


def verdict(rows: Iterable[dict[str, Any]]) -> str:
    """Of the rows of one product and shape: the time of FUSED over that of SEPARATE, and which of
    them the launch table should say; nothing unless both were measured."""
    ms = {row["provider"]: row["ms"] for row in rows}
    if FUSED not in ms or SEPARATE not in ms:
        return ""
    ratio = ms[FUSED] / ms[SEPARATE]
    return f"{ratio:.2f}, {'keeps Triton' if ratio < 1 else 'cuBLAS stays'}"


def tables(rows: Iterable[dict[str, Any]]) -> Iterator[Table]:
    """One for each op, of ``Row.figures`` in the order in which they were measured."""
    for op, of_op in groupby(rows, lambda row: row["op"]):
        yield _table(op, list(of_op))


def _table(op: str, rows: list[dict[str, Any]]) -> Table:
    title = f"{op}, {rows[0]['dtype']}"
    out = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for header in ("shape", "direction", "provider"):
        out.add_column(header, no_wrap=True)
    for header in ("ms", "p10", "p90", "GB/s", "TFLOP/s", "of ceiling"):
        out.add_column(header, justify="right", no_wrap=True)
    products = any(row["provider"] == FUSED for row in rows)
    if products:
        out.add_column("of cuBLAS, then passes", no_wrap=True)
    for (shape, direction), found in groupby(rows, lambda row: (row["shape"], row["direction"])):
        group = list(found)
        for row in group:
            last = [verdict(group) if row["provider"] == FUSED else ""] if products else []
            out.add_row(
                shape,
                direction,
                row["provider"],
                *(f"{row[key]:.4g}" for key in ("ms", "ms_p10", "ms_p90")),
                f"{row['gb_per_s']:.4g}",
                "" if row["tflop_per_s"] is None else f"{row['tflop_per_s']:.3g}",
                "" if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.0%}",
                *last,
            )
            shape = direction = ""  # said once for a group
        out.add_section()
    return out
