"""Pure arithmetic on the speed benchmark's rows: medians, ratios of neighbouring runs, exponents, extrapolation."""

import math
from collections.abc import Sequence
from statistics import linear_regression, median
from typing import Any, NamedTuple

Row = dict[str, Any]
_STRIDE = 4  # of the patches, in pixels
_MATRICES = 3.5  # that anomalib's training step holds at a time: 8 GB at 256 x 256 and batch 32, where one takes 2.1


class Comparison(NamedTuple):
    """One line of the table of targets.

    Attributes:
        name: What is compared.
        ours: This package's figure, in ``unit``.
        anomalib: Anomalib's own.
        unit: Of both: s, ms, GiB, or nothing.
        ratio: Median over rounds of what is to be judged.
        target: What the ratio is to be, such as ``>= 3``; empty where there is no target.
    """

    name: str
    ours: float
    anomalib: float | None
    unit: str
    ratio: float
    target: str

    @property
    def is_met(self) -> bool:
        """Whether the ratio is what it is to be."""
        sign, _, bound = self.target.partition(" ")
        return self.ratio >= float(bound) if sign == ">=" else self.ratio <= float(bound)


def distance_matrix_bytes(batch_size: int, size: int) -> int:
    """Bytes of a float32 matrix of all patches of a batch by all centres, at gamma_c = 1 and size x size pixels."""
    patches = (size // _STRIDE) ** 2
    return 4 * batch_size * patches**2


def needed_bytes(batch_size: int, size: int) -> float:
    """Bytes that anomalib's own Cfa needs at about these settings."""
    return _MATRICES * distance_matrix_bytes(batch_size, size) + 2**30


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The p with which values grow as sizes**p, by least squares of their logarithms."""
    return linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope


def step_seconds(result: Row) -> float:
    """Median step of a fit; the first, which builds an index and starts threads, does not count."""
    steps = result["steps_s"]
    return float(median(steps[1:] or steps))


def whole_fit_seconds(result: Row, batch_size: int, images: int, epochs: int) -> float:
    """Extrapolate a fit that was cut off: all but its steps as measured, and its median step per image for the rest."""
    rest: float = result["total_s"] - sum(result["steps_s"])
    return rest + step_seconds(result) / batch_size * images * epochs


def find(rows: Sequence[Row], part: str, label: str, side: str = "ours") -> list[Row]:
    """Rows that hold a figure, by round."""
    wanted = (part, label, side)
    found = [row for row in rows if (row["part"], row["label"], row["side"]) == wanted]
    return sorted((row for row in found if not {"error", "not_run"} & set(row["result"])), key=lambda row: row["round"])


def labels(rows: Sequence[Row], part: str, start: str = "") -> list[str]:
    """Labels of a part that begin with ``start``, in order, each once."""
    return list(dict.fromkeys(row["label"] for row in rows if row["part"] == part and row["label"].startswith(start)))


def compare(
    name: str, ours: Sequence[float], anomalib: Sequence[float], unit: str, target: str, *, inverse: bool = False
) -> list[Comparison]:
    """Compare figures round by round, as anomalib's over ours, or the inverse; nothing if a side has none."""
    pairs = list(zip(ours, anomalib, strict=False))
    if not pairs:
        return []
    ratio = median(a / b if inverse else b / a for a, b in pairs)
    return [Comparison(name, median(ours), median(anomalib), unit, ratio, target)]


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Every figure that has a target, and those that a reader compares with it."""
    return [*_training(rows), *_k_means(rows), *_inference(rows), *_growth(rows)]


def _training(rows: Sequence[Row]) -> list[Comparison]:
    found = []
    for label in labels(rows, "training", "first time"):
        batch = label.partition(", ")[2]
        ours = [step_seconds(row["result"]) for row in find(rows, "training", label)]
        kept = [step_seconds(row["result"]) for row in find(rows, "training", f"kept, {batch}")]
        anomalib = [step_seconds(row["result"]) for row in find(rows, "training", label, "anomalib")]
        found += compare(f"training step, {batch}, images seen for the first time", ours, anomalib, "s", ">= 3")
        found += compare(f"training step, {batch}, features kept", kept, anomalib, "s", ">= 10")
    largest = labels(rows, "training", "all defaults")
    if not largest:
        return found
    batch = largest[0].partition(", ")[2]
    kept_rows, cut = (
        find(rows, "training", f"kept, {batch}"),
        find(rows, "training", f"first time, {batch}", "anomalib"),
    )
    if kept_rows and cut:
        settings = kept_rows[0]["settings"]
        whole = settings["batch_size"], settings["image_count"], settings["epochs"]
        name = f"whole fit, {batch}, {whole[2]} epochs of {whole[1]} images (anomalib's extrapolated)"
        anomalib = [whole_fit_seconds(row["result"], *whole) for row in cut]
        found += compare(name, [row["result"]["total_s"] for row in kept_rows], anomalib, "s", ">= 8")
        defaults = [row["result"]["total_s"] for row in find(rows, "training", largest[0])]
        found += compare("the same, all of this package's defaults", defaults, anomalib, "s", "")
        ours, anomalib = ([row["result"]["peak_bytes"] / 2**30 for row in side] for side in (kept_rows, cut))
        found += compare(f"peak memory of that fit, {batch}", ours, anomalib, "GiB", ">= 3")
    return found


def _k_means(rows: Sequence[Row]) -> list[Comparison]:
    seconds, inertia = (
        [[row["result"][name] for row in find(rows, "k_means", "K-means", side)] for side in ("ours", "anomalib")]
        for name in ("seconds", "inertia")
    )
    name = "inertia of K-means, ours over anomalib's"
    return [
        *compare("K-means", seconds[0], seconds[1], "s", ">= 10"),
        *compare(name, inertia[0], inertia[1], "", "<= 1", inverse=True),
    ]


def _inference(rows: Sequence[Row]) -> list[Comparison]:
    found = []
    for label in labels(rows, "inference"):
        ours, anomalib = ([row["result"] for row in find(rows, "inference", label, s)] for s in ("ours", "anomalib"))
        if not ours or "whole_s" not in ours[0]:
            continue
        whole, theirs = ([1e3 * one["whole_s"] for one in side] for side in (ours, anomalib))
        target = ">= 2" if label.startswith("resnet18") else ">= 1.7"
        found += compare(f"inference, {label}", whole, theirs, "ms", target)
        alone = [1e3 * one["backbone_s"] for one in ours]
        bound = "<= 1.5" if "gamma_c = 4" in label else ""
        name = f"inference over its backbone alone ({median(alone):.1f} ms), {label}"
        share = median(a / b for a, b in zip(whole, alone, strict=True))
        found.append(Comparison(name, median(whole), None, "ms", share, bound))
    return found


def _growth(rows: Sequence[Row]) -> list[Comparison]:
    found = []
    for row in find(rows, "growth", "training, default, batch 4"):
        peak, size = row["result"]["peak_bytes"] / 2**30, row["settings"]["size"]
        matrix = distance_matrix_bytes(4, size) / 2**30
        name = f"peak memory in GiB, training at {size} x {size}, batch 4 (anomalib's distance matrix alone)"
        found.append(Comparison(name, peak, matrix, "GiB", peak * 2**30 / 1e9, "<= 6"))
    return found
