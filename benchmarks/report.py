"""The speed benchmark's figures as Markdown."""

from collections.abc import Sequence
from typing import Any

from summary import Comparison, Row, comparisons, exponent, find, labels, step_seconds


def markdown(content: dict[str, Any]) -> str:
    """The whole report.

    Args:
        content: That of ``speed.json``.
    """
    rows = content["rows"]
    sections = [
        "# Speed and memory",
        _environment(content),
        _targets(comparisons(rows), judge=not content["settings"]["quick"]),
        _growth(rows),
        _recall(rows),
        _failures(rows),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = max(0, 2 - len(str(int(abs(value)))) + (1 if abs(value) >= 1 else 0))
    return f"{value:.{digits}f}" if abs(value) >= 1 else f"{value:.3g}"


def _environment(content: dict[str, Any]) -> str:
    environment, settings = content["environment"], content["settings"]
    lines = [f"- {key}: {value}" for key, value in environment.get("machine", {}).items() if key != "threads"]
    lines.append("- versions: " + ", ".join(f"{key} {value}" for key, value in environment.get("versions", {}).items()))
    weights = "random" if settings["weights_path"] is None else "ResNet-18's from a file, others random"
    images = "rendered" if settings["images"] is None else "from a folder"
    scale = "quick, far below the sizes that targets are for" if settings["quick"] else "full"
    lines.append(f"- threads: {settings['threads']}; weights: {weights}; images: {images}; scale: {scale}")
    return "\n".join(lines)


def _targets(lines: Sequence[Comparison], *, judge: bool) -> str:
    """Only figures of the full sizes are judged: small ones are mostly overhead."""
    if not lines:
        return ""
    cells = [
        [
            line.name,
            f"{figure(line.ours)} {line.unit}".strip(),
            "" if line.anomalib is None else f"{figure(line.anomalib)} {line.unit}".strip(),
            figure(line.ratio),
            *([line.target, ("yes" if line.is_met else "**no**") if line.target else ""] if judge else []),
        ]
        for line in lines
    ]
    head = ["", "this package", "anomalib", "ratio", *(["target", "met"] if judge else [])]
    return "## Against anomalib's own Cfa\n\nMedians; the ratio is that of neighbouring runs.\n\n" + table(head, cells)


def growth_series(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """By name of a curve: image sides, patches, seconds and GiB."""
    series: dict[str, dict[str, list[float]]] = {}
    for side in ("anomalib", "ours"):
        for label in labels(rows, "growth"):
            for row in find(rows, "growth", label, side) if "batch 4" not in label else ():
                result, size = row["result"], row["settings"]["size"]
                seconds = step_seconds(result) if row["kind"] == "fit" else result["whole_s"]
                name = f"{label}, {'anomalib' if side == 'anomalib' else 'this package'}"
                curve = series.setdefault(name, {"side": [], "patches": [], "seconds": [], "GiB": []})
                values = size, (size // 4) ** 2, seconds, result["peak_bytes"] / 2**30
                for column, value in zip(curve.values(), values, strict=True):
                    column.append(value)
    return series


def _growth(rows: Sequence[Row]) -> str:
    series = growth_series(rows)
    if not series:
        return ""
    sizes = sorted({side for curve in series.values() for side in curve["side"]})
    missing = {
        (f"{row['label']}, anomalib", row["settings"]["size"]): row["result"]["not_run"]
        for row in rows
        if row["part"] == "growth" and "not_run" in row["result"]
    }
    sizes = sorted({*sizes, *(size for _, size in missing)})
    lines = []
    for name, curve in series.items():
        cells = [name]
        for size in sizes:
            if size in curve["side"]:
                at = curve["side"].index(size)
                cells.append(f"{figure(curve['seconds'][at])} s, {figure(curve['GiB'][at])} GiB")
            else:
                cells.append(f"not run: {missing[name, size]}" if (name, size) in missing else "")
        several = len(curve["patches"]) > 1
        cells.append(f"{exponent(curve['patches'], curve['seconds']):.2f}" if several else "")
        cells.append(f"{exponent(curve['patches'][-2:], curve['seconds'][-2:]):.2f}" if several else "")
        lines.append(cells)
    head = ["one image, gamma_c = 1", *(f"{size:.0f}²" for size in sizes), "exponent", "of the last two"]
    note = "Time grows as patches to the power of the exponent; memory is the process's peak."
    return f"## Growth with resolution\n\n{note}\n\n{table(head, lines)}"


def _recall(rows: Sequence[Row]) -> str:
    lines = []
    for label in labels(rows, "recall"):
        for row in find(rows, "recall", label):
            result = row["result"]
            for kind, found in result.get("kinds", {}).items():
                cells = [f"{found['recall']:.4f}", f"{1e3 * found['seconds']:.0f} ms", f"{found['index_s']:.2f} s"]
                lines.append([label, str(result["centers"]), str(result["queries"]), kind, *cells])
    if not lines:
        return ""
    head = ["descriptor", "centres", "queries", "search", "recall@6", "time", "first query with index"]
    return "## Recall against brute force\n\n" + table(head, lines)


def _failures(rows: Sequence[Row]) -> str:
    failed = [
        f"- {row['part']}: {row['label']} ({row['side']}): {row['result']['error']}"
        for row in rows
        if "error" in row["result"]
    ]
    return "## Failed\n\n" + "\n".join(failed) if failed else ""
