"""Results -> a report in Markdown, and the same figures as CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from harness.store import Result


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = max(0, 2 - len(str(int(abs(value)))) + (1 if abs(value) >= 1 else 0))
    return f"{value:.{digits}f}" if abs(value) >= 1 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, of metrics from 0 to 1; an empty cell where there is none."""
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def write_report(
    path: Path, title: str, notes: Sequence[str], sections: Sequence[str], results: Sequence[Result]
) -> str:
    """Write a report, and print it and its path.

    Args:
        path: The report's ``.md`` file.
        title: Its heading.
        notes: What a reader must know, one line each.
        sections: Its tables and pictures.
        results: Those that it shows; they say what it was measured on.
    """
    environments = dict.fromkeys(_described(result["environment"]) for result in results)
    lines = [f"- {line}" for line in [*notes, *environments]]
    text = "\n\n".join([f"# {title}", "\n".join(lines), *sections]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"{text}\nWritten: {path}")
    return text


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write rows; the columns are the union of the rows' keys."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _described(environment: dict[str, dict[str, str]]) -> str:
    return "; ".join(
        ", ".join(f"{name} {value}" for name, value in environment[part].items()) for part in ("machine", "versions")
    )
