"""A run's results -> its report, in Markdown with pictures and CSV."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import yaml

from anomalib_cfa.benchmark import published
from anomalib_cfa.benchmark.folder import Result, RunFolder
from anomalib_cfa.benchmark.heat_map_page import heat_map_page
from anomalib_cfa.benchmark.plots import draw_bars
from anomalib_cfa.benchmark.spec import accelerators, expand
from anomalib_cfa.benchmark.summary import (
    AVERAGE,
    MEASURED,
    METRICS,
    PUBLISHED,
    TIMES,
    summarize,
    tabulate,
)

_F1_NOTES = {
    "test": "threshold chosen on the test side, where anomalib's data modules validate by default; no user can do that",
    "validation": "threshold chosen on a validation split of the training side",
    "none": "anomalib's threshold without a validation side",
}


def write_report(folder: Path | str) -> Path:
    """Write the report of a run, finished or not, into the run's folder.

    Args:
        folder: The run's folder.

    Returns:
        ``report.md``; beside it ``heat_maps.md``, ``results.csv`` with a row for each job, ``summary.csv`` with a row
        for each setting and category, and ``plots/``.

    Raises:
        ValueError: If the folder has no result.
    """
    run = RunFolder(folder)
    results = list(run.results())
    if not results:
        msg = f"folder must hold at least one result of a benchmark, but {run.root} holds none"
        raise ValueError(msg)
    table = tabulate(results)
    summary = summarize(table)
    table.to_csv(run.root / "results.csv", index=False, float_format="%.6g")
    summary.to_csv(run.root / "summary.csv", index=False, float_format="%.6g")
    plots = draw_bars(summary, run.root / "plots")

    sections = [
        f"# Benchmark {run.root.resolve().name}",
        _state(run, results),
        "## How to read it",
        _notes(results, summary),
        "## Averages over categories",
        _averages(summary),
        *(f"![{column}]({path.relative_to(run.root).as_posix()})" for column, path in plots.items()),
        "Best and worst cases of each category: [heat_maps.md](heat_maps.md).",
        *_categories(summary),
        "## What it ran with",
        _provenance(results),
    ]
    if run.config.is_file():
        sections.append(f"```yaml\n{run.config.read_text(encoding='utf-8').strip()}\n```")
    report = run.root / "report.md"
    _write(report, sections)
    _write(run.root / "heat_maps.md", heat_map_page(results))
    return report


def _write(path: Path, sections: Iterable[str]) -> None:
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def _state(run: RunFolder, results: Sequence[Result]) -> str:
    """How much of the run is there, and what failed."""
    finished = sorted(result.finished for result in results)
    seeds = ", ".join(map(str, sorted({result.spec.seed for result in results})))
    lines = [f"Jobs: {len(results)}, the first finished at {finished[0]}, the last at {finished[-1]}. Seeds: {seeds}."]
    if run.config.is_file():
        config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        wanted = [spec for name in accelerators(config) for spec in expand(name, config["benchmark"])]
        missing = [spec for spec in wanted if not run.has_result(spec.key)]
        if missing:
            lines.append(f"**{len(missing)} of the {len(wanted)} jobs of the config are missing.**")
    failures = list(run.failures())
    if failures:
        lines.append("**Failed:**")
        lines += [f"- {failure.title}: `{failure.reason}`" for failure in failures]
    return "\n".join(lines)


def _notes(results: Sequence[Result], summary: pd.DataFrame) -> str:
    notes = [
        "Metrics are in percent, of the test side, after the last epoch. No epoch is picked by looking at it.",
        "± is the sample standard deviation over seeds; without it there is one seed.",
    ]
    sides = sorted({result.threshold_from for result in results})
    notes += [f"F1: {_F1_NOTES[side]}." for side in sides]
    notes.append(
        "fit: wall time of training with the memory bank and one validation; test: of testing, metrics included. host: "
        "the most memory resident in the process at once."
    )
    if summary["paper image AUROC"].notna().any():
        notes.append(f"{published.PAPER_MEANS}.")
    if summary["anomalib image AUROC"].notna().any():
        notes.append(f"{published.ANOMALIB_MEANS}.")
    if any(not published.is_mvtec_ad(result.spec, result.images["test"]) for result in results):
        notes.append(
            "Published figures stand beside jobs on MVTec AD itself only, told by its class and number of test images."
        )
    return "\n".join(f"- {note}" for note in notes)


def _averages(summary: pd.DataFrame) -> str:
    rows = summary[summary["category"] == AVERAGE]
    counts = summary[summary["category"] != AVERAGE].groupby("setting").size()
    measured = [column for column in MEASURED if rows[column].notna().any()]
    lines = [
        [row["setting"], str(counts[row["setting"]]), str(row["seeds"]), *_measured(row, measured)]
        for _, row in rows.iterrows()
    ]
    return _markdown(["setting", "categories", "seeds", *measured], lines)


def _categories(summary: pd.DataFrame) -> Iterable[str]:
    """A table for each setting: a row for each category, and the average."""
    for setting, rows in summary.groupby("setting", sort=True):
        measured = [column for column in (*METRICS.values(), *TIMES[:2]) if rows[column].notna().any()]
        sources = [column for column in PUBLISHED if rows[column].notna().any()]
        lines = [
            [
                _strong(row["category"]),
                str(row["seeds"]),
                *_measured(row, measured),
                *(_number(row[name]) for name in sources),
            ]
            for _, row in rows.iterrows()
        ]
        yield f"## {setting}"
        yield _markdown(["category", "seeds", *measured, *sources], lines)


def _measured(row: pd.Series, columns: Iterable[str]) -> list[str]:
    return [
        _number(row[column]) + ("" if pd.isna(row[f"{column} ±"]) else f" ± {row[f'{column} ±']:.1f}")
        for column in columns
    ]


def _number(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.1f}"


def _strong(category: str) -> str:
    return f"**{category}**" if category == AVERAGE else category


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _provenance(results: Sequence[Result]) -> str:
    told = {
        "Weights": [result.weights for result in results],
        "Epochs": [str(result.epochs) for result in results],
        "Versions": [_joined(result.versions) for result in results],
        "Machine": [_joined({"runs on": result.accelerator, **result.machine}) for result in results],
    }
    lines = []
    for name, values in told.items():
        counted = Counter(values)
        shown = [value if len(counted) == 1 else f"{value} ({count} jobs)" for value, count in counted.items()]
        lines.append(f"- {name}: {'; '.join(shown)}")
    return "\n".join(lines)


def _joined(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
