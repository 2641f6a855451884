"""Which defaults should the method have? Variants of this Cfa over development sets, seeds and backbones.

The labels of development sets choose the method's defaults, over all sets together. The choice is cross-validated with
one set left out at a time: the variant that is best on the others is scored on that set. No user's labels are used.
Finished runs are kept in ``results/choices.jsonl``; the tables are ``choices.md`` and ``choices.csv`` beside it, the
picture is ``choices.png``.

    python benchmarks/choices.py --data SET --data SET ... --backbone resnet18=FILE [--backbone NAME=FILE] --group score
"""

import argparse
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import accuracy
import torch
from harness import Result, Task, answer, markdown_table, write_report
from harness.arguments import Backbones, parser_for_sets
from harness.images import ImageSet
from harness.metrics import METRICS, raw_evaluator
from harness.models import CFA
from harness.tables import write_csv
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure

GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "score": {score: {"score": score} for score in ("local", "nearest", "calibrated", "softmin")},
    "bank": {
        "16,384 or fewer": {},
        "1,024": {"gamma_c": 1},
        "4,096": {"gamma_c": 0.25},
        "mean of each position": {"bank": "mean", "gamma_c": 1},
        "the paper's EMA": {"bank": "ema", "gamma_c": 1},
    },
    "training": {f"lr {lr:g}": {"lr": lr, "epochs": [0, 1, 2, 3, 5, 10]} for lr in (1e-4, 1e-3)},
    "start": {f"whitening {power}": {"whitening": power} for power in (0.5, None, 0, 0.25, 0.75, 1)},
    "search": {kind: {"search": kind} for kind in ("exact", "two_level")},
    "views": {"whole image": {}, "and its centre": {"center_view": True}},
}
"""Groups of variants by name: arguments of Cfa where they are not the defaults, and ``epochs``; a list of them
evaluates one fit after each."""

Figures = Mapping[str, Mapping[str, float]]  # by variant and set


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_for_sets(__doc__)
    parser.add_argument("--backbone", action=Backbones, required=True, metavar="NAME=FILE", help="repeatable")
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="repeatable; default: all")
    parser.add_argument("--size", type=int, default=256, help="image size in pixels; default: %(default)s")
    parser.add_argument("--train-images", type=int, help="at most this many; default: all")
    return parser


def plan(options: argparse.Namespace) -> Iterator[Task]:
    """Every run: the sets of a variant one after the other, all variants of a seed before the next."""
    for group in options.group or GROUPS:
        for seed in range(options.seeds):
            for backbone in options.backbone:
                for variant, arguments in GROUPS[group].items():
                    for data in options.data:
                        task = {"label": f"{group}: {variant}, {data.name}, {backbone}, seed {seed}", "model": CFA}
                        task |= {"group": group, "variant": variant, "options": dict(arguments), "data": data.name}
                        task |= {"seed": seed, "backbone": backbone, "size": options.size}
                        yield task | {"train_images": options.train_images, "test_step": options.test_step}


def measure(task: Task) -> Result:
    """Measure the accuracy of a variant, or how it goes from epoch to epoch."""
    options = dict(task["options"])
    epochs = options.pop("epochs", None)
    task = {**task, "options": options, "epochs": epochs, "weights_path": task["files"][task["backbone"]]}
    return measure_curve(task) if isinstance(epochs, list) else accuracy.measure(task)


def measure_curve(task: Task) -> Result:
    """Test a model after some of its epochs."""
    seed_everything(task["seed"], verbose=False)
    datamodule = ImageSet(Path(task["root"][task["data"]]), task["train_images"], task["seed"], task["test_step"])
    curve = Curve(task["epochs"], datamodule)
    whole = {**task, "epochs": max(task["epochs"])}
    model, engine = accuracy.prepare(whole, has_masks=datamodule.has_masks, callbacks=[curve])
    engine.fit(model, datamodule=datamodule)
    return {"after": curve.found}


class Curve(Callback):
    """Tests the model after some epochs of a fit.

    It does so when the next epoch starts, since the score is calibrated anew at the very end of one.

    Args:
        epochs: After how many; 0 is the model as it starts.
        datamodule: Its test images.
    """

    def __init__(self, epochs: Collection[int], datamodule: ImageSet) -> None:
        self.epochs, self.datamodule = epochs, datamodule
        self.found: dict[str, dict[str, float]] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the model after all epochs but the last."""
        if trainer.current_epoch == 0 and 0 in self.epochs:
            pl_module.model.calibrate_all(pl_module._features)  # noqa: SLF001 - otherwise done at the end of an epoch
        self._test(trainer.current_epoch, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the model after the last epoch."""
        self._test(trainer.current_epoch, pl_module)

    @torch.no_grad()
    def _test(self, epoch: int, model: Any) -> None:
        if epoch not in self.epochs:
            return
        metrics = raw_evaluator(has_masks=self.datamodule.has_masks).test_metrics
        training = model.model.training
        model.model.eval()
        for batch in self.datamodule.test_dataloader():
            model.pre_processor.on_test_batch_start(None, None, batch, 0)
            found = model.model(batch.image.to(model.device))
            batch.update(pred_score=found.pred_score.cpu(), anomaly_map=found.anomaly_map.cpu())
            for metric in metrics:
                metric.update(batch)
        model.model.train(training)
        self.found[str(epoch)] = {metric.name: float(metric.compute()) for metric in metrics}


def report(runs: Sequence[tuple[Task, Result]], options: argparse.Namespace) -> None:
    """Write tables and picture of finished runs."""
    if not runs:
        return
    rows = [row for task, result in runs for row in _rows(task, result)]
    write_csv(options.output / "choices.csv", rows)
    sections = []
    for group in dict.fromkeys(row["group"] for row in rows):
        for backbone in dict.fromkeys(row["backbone"] for row in rows):
            chosen = [row for row in rows if (row["group"], row["backbone"]) == (group, backbone)]
            sections.append(f"## {group}, {backbone}")
            sections += [_table(averages(chosen, metric), title) for metric, title in METRICS.items()]
    draw(rows, options.output / "choices.png")
    sections.append("![Each variant's mean over the sets](choices.png)")
    notes = [
        "development data: its labels chose this package's defaults",
        "each figure is a mean over seeds; 'left out': the variant that is best on the other sets, on the one left out",
    ]
    write_report(options.output / "choices.md", "Choices", notes, sections, [result for _, result in runs])


def _rows(task: Task, result: Result) -> Iterator[dict[str, Any]]:
    columns = ("group", "variant", "data", "seed", "backbone", "size", "train_images")
    row = {name: task[name] for name in columns}
    if "after" not in result:
        yield {**row, **{metric: result.get(metric) for metric in METRICS}}
    for epochs, found in result.get("after", {}).items():
        of_epoch = {"variant": f"{row['variant']}, {epochs} epochs", "curve": row["variant"], "epochs": int(epochs)}
        yield {**row, **of_epoch, **{metric: found.get(metric) for metric in METRICS}}


def averages(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, dict[str, float]]:
    """Means over seeds by variant and set, of those variants that have a figure for every set."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row[metric] is not None:
            found.setdefault(row["variant"], {}).setdefault(row["data"], []).append(row[metric])
    sets = {data for cells in found.values() for data in cells}
    return {
        variant: {data: mean(values) for data, values in cells.items()}
        for variant, cells in found.items()
        if set(cells) == sets
    }


def leave_one_out(figures: Figures) -> dict[str, tuple[str, float]]:
    """For each set the variant that is best on the mean of the others, and what it has on this one."""
    sets = list(next(iter(figures.values())))
    if len(sets) < 2:
        return {}
    chosen = {}
    for left_out in sets:
        best = max(figures, key=lambda name: mean(figures[name][data] for data in sets if data != left_out))
        chosen[left_out] = (best, figures[best][left_out])
    return chosen


def _table(figures: Figures, title: str) -> str:
    if not figures:
        return ""
    sets = list(next(iter(figures.values())))
    ranked = sorted(figures, key=lambda name: -mean(figures[name].values()))
    lines = [
        [name, *(f"{figures[name][data]:.3f}" for data in sets), f"{mean(figures[name].values()):.4f}"]
        for name in ranked
    ]
    if chosen := leave_one_out(figures):
        cells = [f"{value:.3f} ({name})" for name, value in chosen.values()]
        lines.append(["left out", *cells, f"{mean(value for _, value in chosen.values()):.4f}"])
    return markdown_table([title, *sets, "mean"], lines)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw each variant's mean over the sets, or how it goes over epochs, a panel for each group and metric."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    figure = Figure(figsize=(4.5 * len(METRICS), 2.6 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), len(METRICS), squeeze=False)
    for line, group in zip(panels, groups, strict=True):
        for panel, (metric, title) in zip(line, METRICS.items(), strict=True):
            for backbone in backbones:
                chosen = [row for row in rows if (row["group"], row["backbone"]) == (group, backbone)]
                for label, x, y in _lines(chosen, metric):
                    panel.plot(x, y, "o-" if label else "o", label=f"{backbone}{label}")
                    panel.set(xlabel="epochs" if label else title)
            panel.set(title=f"{title}, {group}")
            panel.grid(alpha=0.3)
        line[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _lines(rows: Sequence[Mapping[str, Any]], metric: str) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """What to draw of a group and a backbone: a curve over epochs for each variant, or a point for each."""
    means = {name: mean(cells.values()) for name, cells in averages(rows, metric).items()}
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        if "curve" in row and row["variant"] in means:
            curves.setdefault(row["curve"], {})[row["epochs"]] = means[row["variant"]]
    for name, curve in curves.items():
        yield f", {name}", *map(list, zip(*sorted(curve.items()), strict=True))
    if not curves and means:
        yield "", list(means.values()), list(means)


if __name__ == "__main__":
    sys.exit(answer("choices"))
