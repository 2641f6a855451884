"""A run's results -> its report, in Markdown with pictures and CSV."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import yaml

from anomalib_cfa.benchmark.cases import heat_map_page
from anomalib_cfa.benchmark.folder import Result, RunFolder
from anomalib_cfa.benchmark.plots import draw_bars
from anomalib_cfa.benchmark.published import PUBLISHED, SOURCES, is_mvtec_ad
from anomalib_cfa.benchmark.spec import accelerators, expand
from anomalib_cfa.benchmark.tables import AVERAGE, MEASURED, METRICS, TIMES, label_settings, summarize, tabulate

_F1_NOTES = {
    "test": "threshold chosen on the test split, where anomalib's data modules validate by default: optimistic",
    "validation": "threshold chosen on validation images, which are none of the tested ones",
    "none": "without a validation split: this Cfa's threshold is from training images, other models have none",
}


def write_report(folder: Path | str) -> Path:
    """Write the report of a run, finished or not, into the run's folder, and return ``report.md``.

    Beside it go ``heat_maps.md``, ``results.csv`` with a row for each job, ``summary.csv`` with a row for each setting
    and category, and ``plots/``.

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
        *_inspections(run, results),
        *_categories(summary),
        "## Environment",
        _provenance(results),
    ]
    if run.config.is_file():
        sections.append(f"```yaml\n{run.config.read_text(encoding='utf-8').strip()}\n```")
    report = run.root / "report.md"
    _write(report, sections)
    _write(run.root / "heat_maps.md", heat_map_page(results, label_settings([result.spec for result in results])))
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
        if missing := sum(not run.has_result(spec.key) for spec in wanted):
            lines.append(f"**{missing} of the {len(wanted)} jobs of the config are missing.**")
    failures = [f"- {failure.title}: `{failure.reason}`" for failure in run.failures()]
    return "\n".join([*lines, *(["**Failed:**"] if failures else []), *failures])


def _notes(results: Sequence[Result], summary: pd.DataFrame) -> str:
    notes = [
        "Metrics are in percent, on the test split, after the last epoch; no epoch is chosen by its test metrics.",
        "± is the sample standard deviation over seeds; it is left out where there is only one.",
        *(f"F1: {_F1_NOTES[side]}." for side in sorted({result.threshold_from for result in results})),
        "fit: wall time of training, including memory bank and one validation; test: of testing, including metrics.",
        "host: peak resident memory of the process.",
    ]
    shown = {column.partition(" ")[0] for column in PUBLISHED if summary[column].notna().any()}
    notes += [f"{note}." for source, note in SOURCES.items() if source in shown]
    if not all(is_mvtec_ad(result.spec, result.images["test"]) for result in results):
        notes.append(
            "Published figures are shown only for jobs on MVTec AD itself, recognized by its class and number of test "
            "images."
        )
    return "\n".join(f"- {note}" for note in notes)


def _inspections(run: RunFolder, results: Sequence[Result]) -> Iterator[str]:
    """Links to the pages on which to judge the models, one for each job."""
    pages = [page for result in results if (page := run.inspection(result.spec.key)).is_file()]
    if pages:
        yield "All images of each job, by score and threshold (pages for a browser):"
        yield "\n".join(f"- [{page.stem}]({page.relative_to(run.root).as_posix()})" for page in pages)


def _averages(summary: pd.DataFrame) -> str:
    """A table with a row for each setting."""
    rows = summary[summary["category"] == AVERAGE]
    counts = summary[summary["category"] != AVERAGE].groupby("setting").size()
    measured = [column for column in MEASURED if rows[column].notna().any()]
    lines = [
        [row["setting"], str(counts[row["setting"]]), str(row["seeds"]), *_figures(row, measured)]
        for _, row in rows.iterrows()
    ]
    return _markdown(["setting", "categories", "seeds", *measured], lines)


def _categories(summary: pd.DataFrame) -> Iterator[str]:
    """A table for each setting: a row for each category, and the average."""
    for setting, rows in summary.groupby("setting", sort=True):
        columns = [name for name in (*METRICS.values(), *TIMES[:2], *PUBLISHED) if rows[name].notna().any()]
        lines = []
        for _, row in rows.iterrows():
            category = f"**{AVERAGE}**" if row["category"] == AVERAGE else row["category"]
            lines.append([category, str(row["seeds"]), *_figures(row, columns)])
        yield f"## {setting}"
        yield _markdown(["category", "seeds", *columns], lines)


def _figures(row: pd.Series, columns: Iterable[str]) -> list[str]:
    """The row's figures with their deviations over seeds, where there are any."""
    figures = []
    for column in columns:
        figure = "-" if pd.isna(row[column]) else f"{row[column]:.1f}"
        deviation = row.get(f"{column} ±", float("nan"))
        figures.append(figure if pd.isna(deviation) else f"{figure} ± {deviation:.1f}")
    return figures


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _provenance(results: Sequence[Result]) -> str:
    values = {
        "Weights": [result.weights for result in results],
        "Epochs": [str(result.epochs) for result in results],
        "Versions": [_joined(result.versions) for result in results],
        "Machine": [_joined({"runs on": result.accelerator, **result.machine}) for result in results],
    }
    lines = []
    for name, counted in ((name, Counter(each)) for name, each in values.items()):
        shown = [value if len(counted) == 1 else f"{value} ({count} jobs)" for value, count in counted.items()]
        lines.append(f"- {name}: {'; '.join(shown)}")
    return "\n".join(lines)


def _joined(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
