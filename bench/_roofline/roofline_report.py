"""A run of ``roofline.py`` as tables and as a chart, made from its record alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

# Kinds of work, from the foot of a bar to its end, and what the names of their operators, a colon
# and the name of the kernel contain; the first that fits. A GEMM's epilogue is part of it.
KINDS: dict[str, tuple[str, ...]] = {
    "loss": ("log_softmax", "nll_loss", ": rows", ": scale"),
    "attention": ("attention", "bmm", "softmax", "masked_fill", "tril"),
    "casts": ("_to_copy", "cast"),
    "LayerNorm and residual": ("layer_norm", "aten::add:", "LayerNorm"),
    "matrix products": ("mm", "linear", "mlp"),
    "GELU": ("gelu",),
    "embedding": ("embedding",),
    "copies and sums": ("",),
}
_COLOURS = (
    "#33415c",
    "#c2571a",
    "#a4133c",
    "#6a994e",
    "#5c7fa8",
    "#e0a458",
    "#9d8189",
    "#c9ccd3",
)


def kind(op: str, kernel: str) -> str:
    name = f"{op}: {kernel}"
    return next(kind for kind, parts in KINDS.items() if any(part in name for part in parts))


def title(run: dict[str, Any]) -> str:
    o, ceilings = run["options"], run["ceilings"]
    return (
        f"{o['model']}, B={o['batch_size']}, T={o['block_size']}, {o['dtype']}"
        f"{'' if o['params'] == 'float32' else ' parameters too'}; {ceilings['name']}: "
        f"{ceilings['tflops']:g} TFLOP/s, {ceilings['tb_per_s']:g} TB/s"
    )


def tables(run: dict[str, Any]) -> Iterator[Table]:
    """One of each variant's operators, the floor's parts, and the totals. They fit 80 columns."""
    for variant in run["variants"].values():
        rows = [{"name": name} | op for name, op in variant["ops"].items()]
        yield _parts(variant["label"], rows, variant)
    floor = run["floor"]
    total = {key: sum(row[key] for row in floor["rows"]) for key in ("bytes", "flops", "ms")}
    yield _parts("the floor", floor["rows"], {"calls": None, **total})
    if len(run["variants"]) > 1:
        yield _side_by_side(run)
    yield _totals(run)


def _table(title: str, *headers: str) -> Table:
    out = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    out.add_column(headers[0], no_wrap=True)
    for header in headers[1:]:
        out.add_column(header, justify="right", no_wrap=True)
    return out


def _parts(title: str, rows: list[dict[str, Any]], total: dict[str, Any]) -> Table:
    out = _table(title, "", "calls", "GB", "TFLOP", "ms")
    for row in rows:
        out.add_row(row["name"].removeprefix("aten::"), *_figures(row))
    out.add_section()
    out.add_row("sum", *_figures(total))
    return out


def _figures(row: dict[str, Any]) -> list[str]:
    calls = row["calls"]
    return [
        "" if calls is None else str(calls),
        f"{row['bytes'] / 1e9:.2f}",
        f"{row['flops'] / 1e12:.2f}",
        f"{row['ms']:.2f}",
    ]


def by_kind(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds of every kind of work: of each variant, by its name, and of the floor."""
    out = {}
    for name, variant in run["variants"].items():
        out[name] = dict.fromkeys(KINDS, 0.0)
        for op, total in variant["ops"].items():
            for kernel, ms in total["kernels_ms"].items():
                out[name][kind(op, kernel)] += ms
    out["floor"] = dict.fromkeys(KINDS, 0.0)
    for row in run["floor"]["rows"]:
        out["floor"][row["kind"]] += row["ms"]
    return out


def _side_by_side(run: dict[str, Any]) -> Table:
    kinds = by_kind(run)
    out = _table("ms by kind of work", "", *kinds)
    for name in KINDS:
        out.add_row(name, *(f"{times[name]:.2f}" for times in kinds.values()))
    out.add_section()
    out.add_row("sum", *(f"{sum(times.values()):.2f}" for times in kinds.values()))
    return out


def _totals(run: dict[str, Any]) -> Table:
    out = _table(
        title(run),
        "\n",
        *("ops\n", "GB\n", "TFLOP\n", "ms\n", "x\nfloor", "tokens\n/s", "saved\nGB", "peak\nGB"),
    )
    floor_ms = run["floor"]["ms"]
    for name, variant in run["variants"].items():
        out.add_row(
            name,
            str(variant["calls"]),
            f"{variant['bytes'] / 1e9:.1f}",
            f"{variant['flops'] / 1e12:.2f}",
            f"{variant['ms']:.2f}",
            f"{variant['ms'] / floor_ms:.2f}",
            f"{variant['tokens_per_s']:,.0f}",
            f"{variant['saved_bytes'] / 1e9:.2f}",
            f"{variant['peak_bytes'] / 1e9:.2f}",
        )
    rows = run["floor"]["rows"]
    out.add_row(
        "floor",
        "",
        f"{sum(row['bytes'] for row in rows) / 1e9:.1f}",
        f"{sum(row['flops'] for row in rows) / 1e12:.2f}",
        f"{floor_ms:.2f}",
        "1.00",
        f"{run['tokens'] / floor_ms * 1e3:,.0f}",
        "",
        "",
    )
    return out


def chart(run: dict[str, Any], path: Path) -> None:
    """Predicted milliseconds as bars of stacked kinds of work, the floor below, as a PNG."""
    from matplotlib.figure import Figure

    kinds = by_kind(run)
    labels = [variant["label"] for variant in run["variants"].values()] + ["the floor"]
    figure = Figure(figsize=(9.0, 2.4 + 0.55 * len(labels)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(labels)
    for name, colour in zip(KINDS, _COLOURS, strict=True):
        widths = [times[name] for times in kinds.values()]
        axes.barh(range(len(labels)), widths, left=left, color=colour, label=name, height=0.65)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    floor_ms = run["floor"]["ms"]
    for row, ms in enumerate(left):
        text = f"{ms:.1f} ms" + (f"  {ms / floor_ms:.2f}x" if row < len(labels) - 1 else "")
        axes.annotate(text, (ms, row), xytext=(6, 0), textcoords="offset points", va="center")
    axes.axvline(floor_ms, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("predicted ms of one forward and backward: every kernel at a ceiling, no gaps")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title(run))
    figure.savefig(path, dpi=150)
