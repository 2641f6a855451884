"""Do thresholds from normal images alone keep the requested false-alarm rate, and what do they find?

Fits this Cfa to a set's normal images, without seeing a defect: its thresholds come from the training images, or from a
fifth of them that is held out for validation. On the test images it counts the normal ones, and their pixels, above the
thresholds, and the defective ones. Finished runs are kept in ``results/thresholds.jsonl``; the table is
``thresholds.md`` beside it.

    python benchmarks/thresholds.py --weights-path FILE --data SET [--data SET ...] [--train-images 8]
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.engine import Engine
from harness import Result, Task, answer, markdown_table, write_report
from harness.arguments import parser_for_a_backbone
from harness.images import ImageSet
from harness.models import CFA, build_model
from lightning.pytorch import seed_everything

from anomalib_cfa.post_processing import OneClassPostProcessor

RATES = (0.01, 0.05)
SOURCES = {"training images": 0.0, "held out": 0.2}
"""Where the thresholds come from, and the share of normal images that is held out for that."""

Run = tuple[Task, Result]


class NormalImages(ImageSet):
    """A set of which a share of the normal training images is held out for validation.

    Args:
        root: The set's folder.
        training_images: How many normal images to take, drawn by the seed; None: all.
        seed: Draws them.
        test_step: Test only every n-th image.
        held_out: The share.
    """

    def __init__(self, root: Path, training_images: int | None, seed: int, test_step: int, held_out: float) -> None:
        super().__init__(root, training_images, seed, test_step)
        self.held_out = held_out

    def _setup(self, _stage: str | None = None) -> None:
        super()._setup(_stage)
        count = round(self.held_out * len(self.train_data))
        if count:
            order = torch.randperm(len(self.train_data), generator=torch.Generator().manual_seed(self.draw)).tolist()
            self.val_data = self.train_data.subsample(sorted(order[:count]))
            self.train_data = self.train_data.subsample(sorted(order[count:]))


class SeveralRates(OneClassPostProcessor):
    """One post-processor for each rate, which all learn from the same images."""

    def __init__(self, rates: Sequence[float]) -> None:
        super().__init__(rates[0])
        self.all = [self, *map(OneClassPostProcessor, rates[1:])]

    def update(self, predictions: InferenceBatch | ImageBatch) -> None:
        """Take in normal images."""
        super().update(predictions)
        for other in self.all[1:]:
            other.update(predictions)

    def finish(self, source: str) -> None:
        """Set the thresholds."""
        super().finish(source)
        for other in self.all[1:]:
            other.finish(source)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_for_a_backbone(__doc__)
    parser.add_argument("--size", type=int, default=256, help="image size in pixels; default: %(default)s")
    parser.add_argument("--train-images", type=int, action="append", help="repeatable; default: all")
    return parser


def plan(options: argparse.Namespace) -> Iterator[Task]:
    """Every run."""
    for images in options.train_images or [None]:
        for source in SOURCES:
            for seed in range(options.seeds):
                for data in options.data:
                    task = {"label": f"{source}, {data.name}, seed {seed}", "model": CFA, "source": source}
                    task |= {"data": data.name, "seed": seed, "size": options.size, "train_images": images}
                    task |= {"backbone": options.backbone, "weights": options.weights_path.name}
                    yield task | {"test_step": options.test_step, "rates": list(RATES)}


def measure(task: Task) -> Result:
    """Fit, and count what lies above the thresholds."""
    seed_everything(task["seed"], verbose=False)
    root = Path(task["root"][task["data"]])
    held_out = SOURCES[task["source"]]
    datamodule = NormalImages(root, task["train_images"], task["seed"], task["test_step"], held_out)
    post_processor = SeveralRates(task["rates"])
    model = build_model({**task, "options": {"post_processor": post_processor}})
    quiet: dict[str, Any] = {"accelerator": task["device"], "devices": 1, "logger": False, "enable_progress_bar": False}
    Engine(default_root_dir=task["work"], **quiet).fit(model, datamodule=datamodule)
    model.eval().to(task["device"])
    counted = {rate: {"normal": [], "pixels": [], "defective": []} for rate in task["rates"]}
    with torch.inference_mode():
        for batch in datamodule.test_dataloader():
            raw = model.model(model.pre_processor(batch.image.to(task["device"])))
            for rate, processor in zip(task["rates"], post_processor.all, strict=True):
                predicted = processor(raw)
                normal = ~batch.gt_label.to(task["device"])
                counted[rate]["normal"] += predicted.pred_label[normal].float().tolist()
                counted[rate]["defective"] += predicted.pred_label[~normal].float().tolist()
                counted[rate]["pixels"] += predicted.pred_mask[normal].float().mean(dim=(-2, -1)).tolist()
    found = {str(rate): {name: mean(values) for name, values in of.items()} for rate, of in counted.items()}
    return {"found": found, "images": len(datamodule.train_data)}


def report(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Write the table of finished runs."""
    if not runs:
        return
    lines: list[list[str]] = []
    for source, images in dict.fromkeys((task["source"], task["train_images"]) for task, _ in runs):
        for rate in RATES:
            for data in dict.fromkeys(task["data"] for task, _ in runs):
                chosen = [
                    result["found"][str(rate)]
                    for task, result in runs
                    if (task["source"], task["train_images"], task["data"]) == (source, images, data)
                ]
                if chosen:
                    shares = [
                        f"{100 * mean(of[name] for of in chosen):.1f} %" for name in ("normal", "pixels", "defective")
                    ]
                    lines.append([f"{source}, {images or 'all'}", data, f"{100 * rate:g} %", *shares])
    head = [
        "thresholds from",
        "set",
        "requested",
        "normal images above",
        "their pixels above",
        "defective images found",
    ]
    notes = [
        f"test images, means over {len({task['seed'] for task, _ in runs})} seeds",
        "the rule was designed with these development sets in view",
        f"{runs[0][0]['backbone']} with {runs[0][0]['weights']}, {runs[0][0]['size']} x {runs[0][0]['size']}",
    ]
    table = markdown_table(head, lines)
    write_report(
        options.output / "thresholds.md", "Thresholds from normal images", notes, [table], [run[1] for run in runs]
    )


if __name__ == "__main__":
    sys.exit(answer("thresholds"))
