"""A prediction of ``scaling.py`` as tables and as a chart, made from its record alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

LABELS = {"ddp": "DDP", "fsdp": "FSDP2"}
_COLOURS = {"ddp": "#33415c", "fsdp": "#c2571a"}
NOTE = "predicted, not measured"


def title(run: dict[str, Any]) -> str:
    o, ceilings, cluster = run["options"], run["ceilings"], run["cluster"]
    recompute = ", recompute" if o["recompute"] else ""
    return (
        f"{o['model']}, B={o['batch_size']} x {o['gradient_accumulation_steps']} a GPU, "
        f"T={o['block_size']}, {o['gradients']} gradients{recompute}\n"
        f"{ceilings['name']}: {ceilings['tflops']:g} TFLOP/s, {ceilings['tb_per_s']:g} TB/s; "
        f"nodes of {cluster['gpus_per_node']}, NVLink {cluster['nvlink_gb_per_s']:g} GB/s, "
        f"network {o['network']:g} Gb/s a GPU"
    )


def tables(run: dict[str, Any]) -> Iterator[Table]:
    """One for each way of going parallel. They fit 80 columns."""
    for name, rows in run["parallel"].items():
        out = Table(
            title=f"{LABELS[name]}, {NOTE}\n{title(run)}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for header in (
            "GPUs\n",
            "step\nms",
            "exposed\nms",
            "comm.\nms",
            "sent\nGB a GPU",
            "M tokens\na step",
            "tokens\n/s",
            "efficiency\n",
        ):
            out.add_column(header, justify="right", no_wrap=True)
        for row in rows:
            out.add_row(
                str(row["gpus"]),
                f"{row['ms']:.2f}",
                f"{row['exposed_ms']:.2f}",
                f"{row['communication_ms']:.2f}",
                f"{row['sent_bytes'] / 1e9:.3f}",
                f"{row['tokens'] / 1e6:.2f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['efficiency']:.1%}",
            )
        yield out


def chart(run: dict[str, Any], path: Path) -> None:
    """Tokens per second beside what as many single GPUs would reach, and the efficiency, as a
    PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    label: str | None = "as many single GPUs"  # once
    for name, rows in run["parallel"].items():
        gpus = [row["gpus"] for row in rows]
        speeds = [row["tokens_per_s"] for row in rows]
        ideal = [row["tokens_per_s"] / row["efficiency"] for row in rows]
        style: dict[str, Any] = {"color": _COLOURS[name], "marker": "o", "markersize": 4}
        left.plot(gpus, ideal, color="black", linewidth=0.8, linestyle=":", label=label)
        label = None
        left.plot(gpus, speeds, label=LABELS[name], **style)
        right.plot(gpus, [100 * row["efficiency"] for row in rows], **style)
    left.set_yscale("log")
    left.set_ylabel("tokens per second")
    right.set_ylabel("efficiency in %")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(gpus, [str(number) for number in gpus], rotation=45)
        axes.minorticks_off()
        axes.set_xlabel("GPUs")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{title(run)}\n{NOTE}", fontsize=10)
    figure.savefig(path, dpi=150)
