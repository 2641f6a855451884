"""Bar plots of a summary."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from anomalib_cfa.benchmark.published import PUBLISHED
from anomalib_cfa.benchmark.tables import AVERAGE

PLOTTED = ("image AUROC", "pixel AUROC", "AUPRO", "image F1", "fit, s")
"""Columns that are plotted."""

_MARKERS = {"paper": "_", "anomalib": "x"}


def draw_bars(summary: pd.DataFrame, folder: Path) -> dict[str, Path]:
    """Draw each column of :data:`PLOTTED` that has a value: a group of bars for each category, a bar for each setting.

    Whiskers show the standard deviation over seeds, marks the published figures. Returns the pictures by column.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for column in PLOTTED:
        if summary[column].notna().any():
            path = folder / f"{column.partition(',')[0].replace(' ', '_')}.png"
            _draw(summary, column).savefig(path, dpi=110)
            drawn[column] = path
    return drawn


def _draw(summary: pd.DataFrame, column: str) -> Figure:
    settings = list(summary["setting"].unique())
    categories = [*sorted(set(summary["category"]) - {AVERAGE}), AVERAGE]
    bar = 0.8 / len(settings)
    width = max(7.0, 1.5 + len(categories) * max(0.5, 0.24 * len(settings)))
    figure = Figure(figsize=(width, 4.8), layout="constrained")
    axes = figure.add_subplot()
    published = {f"{source} {column}": source for source in _MARKERS if f"{source} {column}" in PUBLISHED}
    published = {name: source for name, source in published.items() if summary[name].notna().any()}
    for place, setting in enumerate(settings):
        rows = summary[summary["setting"] == setting].set_index("category").reindex(categories)
        centers = [index - 0.4 + (place + 0.5) * bar for index in range(len(categories))]
        axes.bar(centers, rows[column], bar * 0.92, yerr=rows[f"{column} ±"], capsize=2, label=setting)
        for name, source in published.items():
            label = f"{source}, published" if place == 0 else None
            axes.scatter(centers, rows[name], s=30, marker=_MARKERS[source], color="black", zorder=3, label=label)
    axes.set_xticks(range(len(categories)), categories, rotation=30, ha="right")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    if column.endswith(", s"):
        axes.set_ylabel(column)
    else:
        lowest = summary[[column, *published]].min().min()
        bottom = max(0.0, 5 * ((lowest - 5) // 5))
        axes.set_ylim(bottom, 100.5)
        axes.set_ylabel(f"{column}, %")
        axes.set_title(f"The axis starts at {bottom:.0f} %", fontsize=9, loc="right")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
