"""Results -> tables: one row for each job, and one for each setting and category, averaged over seeds."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from anomalib_cfa.benchmark import published
from anomalib_cfa.benchmark.folder import Result
from anomalib_cfa.benchmark.labels import label_settings

AVERAGE = "average"
"""The row over all categories of a setting."""

METRICS = {
    "image_AUROC": "image AUROC",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AUPRO": "AUPRO",
    "image_F1Score": "image F1",
    "pixel_F1Score": "pixel F1",
}
"""Columns of metrics, in percent, by anomalib's names."""

TIMES = ("fit, s", "test, s", "test, ms/image")
MEMORY = ("host GiB", "GPU GiB")
MEASURED = (*METRICS.values(), *TIMES, *MEMORY)
"""Columns that are averaged over seeds."""

PUBLISHED = (
    "paper image AUROC",
    "paper pixel AUROC",
    "anomalib image AUROC",
    "anomalib pixel AUROC",
    "anomalib AUPRO",
)
"""Columns of published figures, in percent."""


def tabulate(results: Sequence[Result]) -> pd.DataFrame:
    """One row for each job: its setting, category and seed, all that was measured, and what was published."""
    labels = label_settings([result.spec for result in results])
    rows = [_row(result, label) for result, label in zip(results, labels, strict=True)]
    return pd.DataFrame(rows).sort_values(["setting", "category", "seed"], ignore_index=True)


def _row(result: Result, label: str) -> dict[str, Any]:
    spec = result.spec
    row: dict[str, Any] = {"setting": label, "category": spec.category, "seed": spec.seed}
    for name, column in METRICS.items():
        row[column] = _scaled(result.metrics.get(name), 100)
    row["fit, s"], row["test, s"] = result.seconds["fit"], result.seconds["test"]
    row["test, ms/image"] = 1000 * result.seconds["test"] / result.images["test"]
    row["host GiB"] = _scaled(result.peak_memory["host"], 2**-30)
    row["GPU GiB"] = _scaled(result.peak_memory["device"], 2**-30)
    comparable = published.is_mvtec_ad(spec, result.images["test"])
    paper = (published.paper(spec) if comparable else None) or (None, None)
    anomalib = (published.anomalib(spec) if comparable else None) or (None, None, None)
    row |= {name: _scaled(value, 1) for name, value in zip(PUBLISHED, (*paper[:2], *anomalib), strict=True)}
    row |= {"epochs": result.epochs, "train images": result.images["train"], "test images": result.images["test"]}
    row |= {"thresholds from": result.threshold_from, "weights": result.weights, "finished": result.finished}
    return row | {"key": spec.key}


def _scaled(value: float | None, factor: float) -> float:
    return float("nan") if value is None else value * factor


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Average a table of :func:`tabulate` over seeds.

    Returns:
        One row for each setting and category, and one for each setting's average over its categories: the number of
        ``seeds``, the mean of each column of :data:`MEASURED`, its sample standard deviation over seeds as
        ``<column> ±``, nan for one seed, and :data:`PUBLISHED`. The average is over those seeds that have every
        category, or over the categories' means where no seed has.
    """
    parts = []
    for setting, jobs in table.groupby("setting", sort=True):
        by_category = [_average(rows, str(category)) for category, rows in jobs.groupby("category", sort=True)]
        categories = jobs["category"].nunique()
        complete = jobs.groupby("seed").filter(lambda rows, wanted=categories: rows["category"].nunique() == wanted)
        if complete.empty:
            per_seed = pd.DataFrame(by_category)[list(MEASURED)].mean().to_frame().T
        else:
            per_seed = complete.groupby("seed")[list(MEASURED)].mean()
        overall = _average(per_seed, AVERAGE)
        for column in PUBLISHED:  # nan unless every category has a figure
            overall[column] = pd.Series([row[column] for row in by_category]).mean(skipna=False)
        part = pd.DataFrame([*by_category, overall])
        part.insert(0, "setting", setting)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _average(rows: pd.DataFrame, category: str) -> dict[str, Any]:
    averaged: dict[str, Any] = {"category": category, "seeds": len(rows)}
    for column in MEASURED:
        averaged[column] = rows[column].mean(skipna=False)
        averaged[f"{column} ±"] = rows[column].std(ddof=1, skipna=False)
    for column in PUBLISHED:
        averaged[column] = rows[column].iloc[0] if column in rows else float("nan")
    return averaged
