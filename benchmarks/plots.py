"""The speed benchmark's figures as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, StrMethodFormatter
from report import growth_series
from summary import Row, find, labels

mpl.use("Agg")

_MARKERS = {"exact": "o", "pca": "s", "ivf": "^", "hnsw": "D"}


def draw(content: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what there is to be drawn.

    Args:
        content: That of ``speed.json``.
        folder: Where the pictures go.

    Returns:
        Their paths.
    """
    rows: list[Row] = content["rows"]
    pictures = []
    if series := growth_series(rows):
        pictures.append(_save(_growth(series), folder / "growth.png"))
    if searched := [
        row for label in labels(rows, "recall") for row in find(rows, "recall", label) if row["kind"] == "recall"
    ]:
        pictures.append(_save(_recall(searched), folder / "recall.png"))
    return pictures


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path


def _growth(series: dict[str, dict[str, list[float]]]) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2), ("seconds", "GiB"), ("Time in s", "Peak memory in GiB"), strict=True
    ):
        for name, curve in series.items():
            own = name.endswith("anomalib")
            line = "--" if name.startswith("inference") else "-"
            axes.plot(
                curve["side"], curve[column], line, marker="x" if own else "o", label=name, lw=2.5 if own else 1.5
            )
        axes.set(xscale="log", yscale="log", xlabel="Side of the image in pixels", title=title)
        axes.grid(alpha=0.3, which="both")
        _plain_ticks(axes.yaxis)
        _sides(axes, sorted({side for curve in series.values() for side in curve["side"]}))
    figure.axes[0].legend(fontsize=8)
    figure.suptitle("One image, gamma_c = 1")
    return figure


def _sides(axes: Axes, sides: Sequence[float]) -> None:
    """Tick the sides that were measured, and above them the memory bank's size."""
    axes.set_xticks(sides, [f"{side:.0f}" for side in sides], minor=False)
    axes.set_xticks([], minor=True)
    above = axes.secondary_xaxis("top", functions=(lambda side: side, lambda side: side))
    above.set_xticks(sides, [f"{(side // 4) ** 2:,.0f}" for side in sides], fontsize=8)
    above.set_xticks([], minor=True)
    above.set_xlabel("Centres in the memory bank", fontsize=8)


def _plain_ticks(axis: Axis) -> None:
    """Numbers in place of powers of ten, which say nothing where an axis spans a factor of two."""
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))


def _recall(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows):
        for kind, found in row["result"]["kinds"].items():
            milliseconds = 1e3 * found["seconds"] / row["result"]["queries"] * 1024
            label = f"{kind}, {row['label']}"
            axes.plot(milliseconds, found["recall"], _MARKERS.get(kind, "x"), color=f"C{number}", label=label)
    axes.set(xscale="log", xlabel="Milliseconds per 1,024 patches", ylabel="Recall@6 against brute force")
    axes.grid(alpha=0.3, which="both")
    _plain_ticks(axes.xaxis)
    axes.legend(fontsize=7)
    return figure
