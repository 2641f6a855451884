"""The ablation's runs as Markdown tables."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from report import table

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}
Cell = dict[tuple[str, int], dict[str, float]]  # by data set and seed: each metric, averaged over kinds of defect


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """A table for each group of variants, and for each side that was judged."""
    sections = []
    for group in dict.fromkeys(run["key"]["group"] for run in runs):
        members = [run for run in runs if run["key"]["group"] == group]
        for side in ("validation", "test"):
            rows = collect(members, side)
            if rows:
                sections.append(f"## {group} ({side})\n\n{_table(rows)}")
    return "# Ablation\n\n" + "\n\n".join(sections) + "\n"


def collect(runs: Sequence[dict[str, Any]], side: str) -> dict[str, Cell]:
    """Figures by label of the row."""
    found: dict[str, dict[tuple[str, int], list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        key, variant = run["key"], run["key"]["variant"]
        for row in run["judged"]:
            if row["side"] != side:
                continue
            several = len(variant["sigmas"]) > 1
            sigma = f", sigma={row['sigma']:g}" if several else ""
            label = f"{variant['name']}, {row['epochs']} epochs, {row['score']}{sigma}"
            found[label][key["data"], key["seed"]].append(row)
    return {
        label: {place: {name: mean(row[name] for row in rows) for name in METRICS} for place, rows in cells.items()}
        for label, cells in found.items()
    }


def _table(rows: dict[str, Cell]) -> str:
    reference = next(iter(rows.values()))
    data = list(dict.fromkeys(name for cell in rows.values() for name, _ in cell))
    lines = []
    for label, cell in rows.items():
        figures = []
        for name in data:
            values = [figures for (where, _), figures in cell.items() if where == name]
            figures.append(" / ".join(f"{mean(value[metric] for value in values):.3f}" for metric in METRICS))
        for metric in METRICS:
            differences = [cell[place][metric] - reference[place][metric] for place in cell if place in reference]
            figures.append(_spread(differences))
        lines.append([label, *figures])
    head = ["", *(f"{name}: {' / '.join(METRICS.values())}" for name in data)]
    return table([*head, *(f"Δ {name}" for name in METRICS.values())], lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):+.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
