"""The comparison's runs as Markdown."""

import json
from collections.abc import Sequence
from statistics import mean, median, stdev
from typing import Any

from report import figure, table

Run = dict[str, Any]
ACCURACY = {
    "image_RawAUROC": "image AUROC",
    "pixel_RawAUROC": "pixel AUROC",
    "pixel_AUPRO": "AUPRO",
    "pixel_NormalFalsePositivesAUPRO": "AUPRO with false positives of normal images only",
}


def markdown(runs: Sequence[Run]) -> str:
    """A row for each model: accuracy as mean ± deviation over seeds, medians of time and memory."""
    if not runs:
        return "# Comparison\n\nNo run is finished.\n"
    lines = []
    for model in dict.fromkeys(run["task"]["model"] for run in runs):
        results = [run["result"] for run in runs if run["task"]["model"] == model]
        lines.append(
            [
                _label(model, [run for run in runs if run["task"]["model"] == model]),
                *(_spread([one[name] for one in results]) for name in ACCURACY),
                f"{figure(median(one['fit_s'] for one in results))} s",
                f"{figure(median(one['fit_peak_bytes'] for one in results) / 2**30)} GiB",
                f"{figure(1e3 * median(one['latency_s'] for one in results))} ms",
                str(results[0]["bank"] or "none"),
            ]
        )
    head = ["", *ACCURACY.values(), "fit", "peak memory of the fit", "one image", "bank"]
    return f"# Comparison\n\n{_environment(runs)}\n\n{table(head, lines)}\n"


def _label(model: str, runs: Sequence[Run]) -> str:
    task, result = runs[0]["task"], runs[0]["result"]
    parts = ["1 seed" if len(runs) == 1 else f"{len(runs)} seeds"]
    if "epochs" in task:
        parts.append(f"{result['epochs']} epochs")
    options = {"gamma_c": task["gamma_c"]} if "gamma_c" in task else task.get("options", {})
    parts.extend(f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items())
    if "coreset" in task:
        parts.append(f"coreset {task['coreset']:g}")
    return f"{model} ({', '.join(parts)})"


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _environment(runs: Sequence[Run]) -> str:
    task, result = runs[0]["task"], runs[0]["result"]
    images = f"{result['training_images']} training and {result['test_images']} test images"
    return "\n".join(
        [
            f"- {task['data']}: {images}, {task['size']} x {task['size']} pixels",
            f"- ResNet-18 with {task['weights']}; {task['threads']} thread{'s' * (task['threads'] > 1)}",
            f"- machine: {_listed(result['machine'])}",
            f"- versions: {_listed(result['versions'])}",
            "- the last epoch; scores as they are, no threshold; batches of 32, where a model is trained in batches",
        ]
    )


def _listed(items: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in items.items())
