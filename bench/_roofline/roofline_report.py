"""The table and the chart of ``roofline.py``, made from its record."""

from pathlib import Path
from typing import Any

from rich.table import Table

from bench._harness import cli
from bench._harness.bars import stacked_bars

# Kinds of work in the order of the bars, with substrings of "operator: kernel". The first match
# counts. A GEMM's epilogue belongs to the GEMM.
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


def table(run: dict[str, Any]) -> Table:
    """Each variant's operators and their sum, then the floor's parts. It fits in 80 columns."""
    out = cli.plain_table(title(run), ("",), ("calls", "GB", "TFLOP", "ms", "saved GB"))
    for name, variant in run["variants"].items():
        for op, total in variant["ops"].items():
            shown = op.removeprefix("aten::").replace("scaled_dot_product_", "")
            out.add_row(shown, str(total["calls"]), *_figures(total))
        saved = f"{variant['saved_bytes'] / 1e9:.2f}"
        out.add_row(name, str(variant["calls"]), *_figures(variant), saved, style="bold")
        out.add_section()
    rows = run["floor"]["rows"]
    for row in rows:
        out.add_row(row["name"], str(row["calls"]), *_figures(row))
    total = {key: sum(row[key] for row in rows) for key in ("bytes", "flops", "ms")}
    out.add_row("the floor", "", *_figures(total), style="bold")
    return out


def _figures(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['bytes'] / 1e9:.2f}", f"{row['flops'] / 1e12:.2f}", f"{row['ms']:.2f}"


def by_kind(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds of each kind of work, for every variant by name and for the floor."""
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


def chart(run: dict[str, Any], path: Path) -> None:
    """Write a PNG of the predicted milliseconds as stacked bars, with the floor at the bottom."""
    labels = [variant["label"] for variant in run["variants"].values()] + ["the floor"]
    stacked_bars(
        dict(zip(labels, by_kind(run).values(), strict=True)),
        title(run),
        "predicted ms of one forward and backward: every kernel at a ceiling, no gaps",
        path,
    )
