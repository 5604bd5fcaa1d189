"""The results of ``bench_<op>.py`` as tables."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rich.table import Table

from bench._harness.cli import plain_table


def tables(rows: Iterable[dict[str, Any]]) -> Iterator[Table]:
    """One table per op, from ``Row.figures`` in the order of measurement."""
    for op, of_op in groupby(rows, lambda row: row["op"]):
        yield _table(op, list(of_op))


def _table(op: str, rows: list[dict[str, Any]]) -> Table:
    out = plain_table(
        f"{op}, {rows[0]['dtype']}",
        ("shape", "direction", "provider"),
        ("ms", "p10", "p90", "GB/s", "TFLOP/s", "of ceiling", f"over {rows[0]['baseline']}"),
    )
    for (shape, direction), found in groupby(rows, lambda row: (row["shape"], row["direction"])):
        group = list(found)
        base = next((row["ms"] for row in group if row["provider"] == row["baseline"]), None)
        for row in group:
            share, tflops = row["share_of_ceiling"], row["tflop_per_s"]
            out.add_row(
                shape,
                direction,
                row["provider"],
                *(f"{row[key]:.4g}" for key in ("ms", "ms_p10", "ms_p90", "gb_per_s")),
                "" if tflops is None else f"{tflops:.3g}",
                "" if share is None else f"{share:.0%}",
                "" if base is None else f"{base / row['ms']:.2f}x",
            )
            shape = direction = ""  # shown once per group
        out.add_section()
    return out
