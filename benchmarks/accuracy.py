"""How accurate is this Cfa with its defaults, compared with anomalib's models, and at what cost?

All get the same backbone weights and pixels, on all test images of any sets in MVTec AD's layout, after the last
epoch. Image AUROC, pixel AUROC, AUPRO, seconds and memory of the fit, and milliseconds for an image. Finished runs are
kept in ``results/accuracy.jsonl``; the tables are ``accuracy.md`` and ``accuracy.csv`` beside it.

    python benchmarks/accuracy.py --weights-path FILE --data SET [--data SET ...] [--size 256 --size 512]
    python benchmarks/accuracy.py --weights-path FILE --data SET --train-images 1 --train-images 4  # few images
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from anomalib.engine import Engine
from harness import Result, Task, answer, figure, markdown_table, spread, write_report
from harness.arguments import parser_for_a_backbone
from harness.images import ImageSet, load_image
from harness.metrics import METRICS, raw_evaluator
from harness.models import ANOMALIB_CFA, CFA, MODELS, bank_size, build_model
from harness.tables import write_csv
from harness.timing import alternate, now, peak_memory
from lightning.pytorch import Callback, seed_everything

Run = tuple[Task, Result]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_for_a_backbone(__doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable; default: all")
    parser.add_argument("--size", type=int, action="append", help="image size in pixels; repeatable; default: 256")
    parser.add_argument("--train-images", type=int, action="append", help="repeatable; default: all")
    parser.add_argument("--anomalib-epochs", type=int, default=1, help="epochs of anomalib's Cfa; default: %(default)s")
    parser.add_argument("--option", type=_option, action="append", default=[], metavar="NAME=VALUE", help="Cfa option")
    return parser


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        msg = f"must be NAME=VALUE, but is {text}"
        raise argparse.ArgumentTypeError(msg)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def plan(options: argparse.Namespace) -> Iterator[Task]:
    """Every run, the quick models first."""
    for model in options.model or MODELS:
        for seed in range(options.seeds):
            for size in options.size or [256]:
                for images in options.train_images or [None]:
                    for data in options.data:
                        yield task_of(model, data.name, seed, size, images, options)


def task_of(model: str, data: str, seed: int, size: int, images: int | None, options: argparse.Namespace) -> Task:
    """A task: everything that determines its result."""
    task: Task = {"label": f"{model}, {data}, {size}, seed {seed}", "model": model, "data": data, "seed": seed}
    task |= {"size": size, "backbone": options.backbone, "weights": options.weights_path.name}
    task |= {"train_images": images, "test_step": options.test_step}
    if model == CFA:
        task["options"] = dict(options.option)
    if model == ANOMALIB_CFA:
        task |= {"side": "anomalib", "epochs": options.anomalib_epochs}
    return task


def measure(task: Task) -> Result:
    """Fit a model, time one image, and test it."""
    seed_everything(task["seed"], verbose=False)
    root = Path(task["root"][task["data"]])
    datamodule = ImageSet(root, task["train_images"], task["seed"], task["test_step"])
    model, engine = prepare(task, has_masks=datamodule.has_masks)
    began = now()
    engine.fit(model, datamodule=datamodule)
    seconds, peak = now() - began, peak_memory(task["device"])
    model.eval().to(task["device"])
    image = load_image(model, min((root / "train/good").iterdir())).to(task["device"])
    with torch.inference_mode():
        (latency,) = alternate([lambda: model.model(image)], repeats=20)
    (metrics,) = engine.test(model, datamodule=datamodule, verbose=False)
    counts = {"training_images": len(datamodule.train_data), "test_images": len(datamodule.test_data)}
    costs = {"fit_s": seconds, "fit_peak_bytes": peak, "latency_s": latency, "bank": bank_size(model)}
    return {**metrics, **counts, **costs, "epochs": engine.trainer.current_epoch}


def prepare(task: Task, *, has_masks: bool, callbacks: Sequence[Callback] = ()) -> tuple[Any, Engine]:
    """A task's model, which gives raw scores, and an engine to fit and test it with."""
    model = build_model(task)
    model.evaluator = raw_evaluator(has_masks=has_masks)
    model.post_processor = None  # it would clamp scores to [0, 1]
    epochs = {} if task.get("epochs") is None else {"max_epochs": task["epochs"]}
    engine = Engine(
        accelerator=task["device"],
        devices=1,
        callbacks=list(callbacks),
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=task["work"],
        **epochs,
    )
    return model, engine


def report(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Write the tables of finished runs."""
    if not runs:
        return
    write_csv(options.output / "accuracy.csv", [_row(task, result) for task, result in runs])
    settings = dict.fromkeys((task["size"], task["train_images"]) for task, _ in runs)
    sections = []
    for size, images in settings:
        chosen = [run for run in runs if (run[0]["size"], run[0]["train_images"]) == (size, images)]
        heading = f"## {size} x {size}" + ("" if images is None else f", {images} training images")
        sections += [heading, *(_metric_table(chosen, name) for name in METRICS), _cost_table(chosen)]
    notes = [
        "the last epoch, raw scores; mean ± sample standard deviation over seeds, with their number in brackets",
        "sets whose labels helped to choose this package's defaults are development data, not a test of them",
        f"{runs[0][0]['backbone']} with {runs[0][0]['weights']}",
    ]
    write_report(options.output / "accuracy.md", "Accuracy", notes, sections, [result for _, result in runs])


def name_of(task: Task) -> str:
    """A model with its options, and how long it was trained where it does not say so itself."""
    options = [f"{name} {value}" for name, value in task.get("options", {}).items()]
    if epochs := task.get("epochs"):
        options.append(f"{epochs} epoch" if epochs == 1 else f"{epochs} epochs")
    return ", ".join([task["model"], *options])


def _row(task: Task, result: Result) -> dict[str, object]:
    kept = ("data", "seed", "size", "train_images", "backbone", "weights")
    figures = {name: value for name, value in result.items() if name != "environment"}
    return {"model": name_of(task), **{name: task[name] for name in kept}, **figures, "machine": _machine(result)}


def _by_model(runs: Sequence[Run]) -> dict[str, list[Run]]:
    names = dict.fromkeys(name_of(task) for task, _ in runs)
    return {name: [run for run in runs if name_of(run[0]) == name] for name in names}


def _metric_table(runs: Sequence[Run], metric: str) -> str:
    sets = [data for data in dict.fromkeys(task["data"] for task, _ in runs) if _values(runs, data, metric)]
    if not sets:
        return ""
    lines = []
    for name, of_model in _by_model(runs).items():
        cells = [_values(of_model, data, metric) for data in sets]
        fewest, most = (choose((len(cell) for cell in cells if cell), default=0) for choose in (min, max))
        seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
        average = f"{mean(mean(cell) for cell in cells):.3f}" if all(cells) else ""
        lines.append([f"{name} ({seeds})", *map(spread, cells), average])
    return markdown_table([METRICS[metric], *sets, "mean"], lines)


def _values(runs: Sequence[Run], data: str, metric: str) -> list[float]:
    return [result[metric] for task, result in runs if task["data"] == data and metric in result]


def _machine(result: Result) -> str:
    machine: dict[str, str] = result["environment"]["machine"]
    return machine.get("accelerator") or machine["processor"]


def _cost_table(runs: Sequence[Run]) -> str:
    lines = []
    for name, machine in dict.fromkeys((name_of(task), _machine(result)) for task, result in runs):
        results = [result for task, result in runs if (name_of(task), _machine(result)) == (name, machine)]
        fits = sorted(result["fit_s"] for result in results)
        fit = f"{figure(median(fits))} s ({figure(fits[0])} to {figure(fits[-1])})"
        memory = f"{figure(max(result['fit_peak_bytes'] for result in results) / 2**30)} GiB"
        banks = sorted({result["bank"] or 0 for result in results})
        bank = f"{banks[0]} to {banks[-1]}" if len(banks) > 1 else str(banks[0] or "none")
        latency = f"{figure(1e3 * median(result['latency_s'] for result in results))} ms"
        lines.append([name, machine, fit, memory, latency, bank])
    head = ["", "on", "fit, median over runs", "its peak memory, at most", "one image", "bank"]
    return markdown_table(head, lines)


if __name__ == "__main__":
    sys.exit(answer("accuracy"))
