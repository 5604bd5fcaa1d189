"""The figures of ``bench_<op>.py`` as tables."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table


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
    for (shape, direction), group in groupby(rows, lambda row: (row["shape"], row["direction"])):
        for row in group:
            out.add_row(
                shape,
                direction,
                row["provider"],
                *(f"{row[key]:.4g}" for key in ("ms", "ms_p10", "ms_p90")),
                f"{row['gb_per_s']:.4g}",
                "" if row["tflop_per_s"] is None else f"{row['tflop_per_s']:.3g}",
                "" if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.0%}",
            )
            shape = direction = ""  # said once for a group
        out.add_section()
    return out
