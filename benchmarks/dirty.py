"""What do defective images among the training images cost, is there a cheap remedy, and are they detected?

A share of the training images are defective test images, drawn with the seed. Those used for the largest share are left
out of every test, so that shares are comparable. A set with too few gives at most half of its defective images. Image
AUROC, pixel AUROC and AUPRO of this Cfa by default, of robust variants of it, and of anomalib's models; and how many of
the images that this Cfa names were mixed in. Finished runs are kept in ``results/dirty.jsonl``; the table is
``dirty.md`` beside it.

    python benchmarks/dirty.py --weights-path FILE --data SET [--data SET ...] [--peers]
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
import torch
from accuracy import prepare
from harness import Result, Task, answer, markdown_table, spread, write_report
from harness.arguments import parser_for_a_backbone
from harness.images import ImageSet
from harness.metrics import METRICS
from harness.models import CFA, PADIM, PATCHCORE_1
from lightning.pytorch import seed_everything

from anomalib_cfa.processes import Processes
from anomalib_cfa.training.features import TrainingFeatures

AS_TYPED = "as typed"
WITHOUT_NAMED = "fitted again without the images it names"
SHARED_CENTERS = "without centres of a single image"
VARIANTS = (AS_TYPED, SHARED_CENTERS)
_SHARES = (0, 1, 2, 5, 10)  # percent of the training images
_SMALL = 100  # training images up to which PatchCore is affordable

Run = tuple[Task, Result]


class DirtySet(ImageSet):
    """A set in MVTec AD's layout with some of its defective test images among the training images.

    Args:
        root: The set's folder.
        mixed: How many defective images to train on.
        reserved: How many not to test on, the mixed ones among them.
        seed: Draws them. More are drawn in addition to fewer.
        test_step: Test only every n-th image.
        without: Paths of images not to train on after all.
    """

    def __init__(
        self, root: Path, mixed: int, reserved: int, seed: int, test_step: int = 1, without: Sequence[str] = ()
    ) -> None:
        super().__init__(root, seed=seed, test_step=test_step)
        self.numbers, self.without, self.mixed = (mixed, reserved), without, list[str]()

    def _setup(self, _stage: str | None = None) -> None:
        super()._setup(_stage)
        mixed, reserved = self.numbers
        tested = self.test_data.samples
        defects = tested.index[tested.label_index == 1]
        order = torch.randperm(len(defects), generator=torch.Generator().manual_seed(self.draw)).tolist()
        rows = tested.loc[defects[order[:mixed]]].assign(label="normal", label_index=0, mask_path="")
        self.mixed = list(rows.image_path)
        normal = self.train_data.samples
        training = pd.concat([normal, rows.reindex(columns=normal.columns)])
        training = training[~training.image_path.isin(self.without)]
        training.attrs = normal.attrs
        self.train_data.samples = training
        kept = tested.index.difference(defects[order[:reserved]])
        self.test_data = self.test_data.subsample(kept.tolist())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_for_a_backbone(__doc__)
    parser.add_argument("--size", type=int, default=256, help="image size in pixels; default: %(default)s")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="repeatable; default: all")
    parser.add_argument("--peers", action="store_true", help="also the baselines: PaDiM, and PatchCore on small sets")
    return parser


def plan(options: argparse.Namespace) -> Iterator[Task]:
    """Every run, once: a small set may have one number of images for several shares."""
    models = [(CFA, variant) for variant in options.variant or VARIANTS]
    models += [(PADIM, ""), (PATCHCORE_1, "")] if options.peers else []
    for model, variant in models:
        for data in options.data:
            normal, defective = count_images(data)
            if model == PATCHCORE_1 and normal > _SMALL:
                continue
            numbers = [mixed_images(share, normal, defective) for share in _SHARES]
            for seed in range(options.seeds):
                for mixed in dict.fromkeys(numbers):
                    label = f"{variant or model}, {data.name}, {mixed} mixed in, seed {seed}"
                    task = {"label": label, "model": model, "variant": variant, "data": data.name, "seed": seed}
                    task |= {"normal": normal, "mixed": mixed, "reserved": max(numbers), "numbers": numbers}
                    task |= {"size": options.size, "backbone": options.backbone, "weights": options.weights_path.name}
                    yield task | {"test_step": options.test_step}


def count_images(root: Path) -> tuple[int, int]:
    """How many normal training images and how many defective test images a set has."""
    kinds = [kind for kind in (root / "test").iterdir() if kind.is_dir() and kind.name != "good"]
    return len(list((root / "train/good").iterdir())), sum(len(list(kind.iterdir())) for kind in kinds)


def mixed_images(share: int, normal: int, defective: int) -> int:
    """How many defective images make up ``share`` percent of the training images; at most half of them."""
    wanted = max(1, round(normal * share / (100 - share))) if share else 0
    return min(wanted, defective // 2)


def measure(task: Task) -> Result:
    """Fit a model to dirty images, and test it."""
    seed_everything(task["seed"], verbose=False)
    root = Path(task["root"][task["data"]])
    numbers = task["mixed"], task["reserved"]
    datamodule = DirtySet(root, *numbers, task["seed"], task["test_step"])
    model, engine = prepare(task, has_masks=datamodule.has_masks)
    if task["variant"] == SHARED_CENTERS:
        share_centers(model)
    engine.fit(model, datamodule=datamodule)
    (metrics,) = engine.test(model, datamodule=datamodule, verbose=False)
    counts = {"training_images": len(datamodule.train_data), "test_images": len(datamodule.test_data)}
    result: Result = {**metrics, **counts}
    if task["variant"] == AS_TYPED:
        named = [path for path, _ in model.worst_fitting]
        result |= {"named": len(named), "right": len(set(named) & set(datamodule.mixed)), "again": metrics}
        if named:
            datamodule = DirtySet(root, *numbers, task["seed"], task["test_step"], named)
            model, engine = prepare(task, has_masks=datamodule.has_masks)
            engine.fit(model, datamodule=datamodule)
            (result["again"],) = engine.test(model, datamodule=datamodule, verbose=False)
    return result


def share_centers(model: Any) -> None:  # this package's Cfa, whose class is imported late
    """Let a model drop the centres to which patches of a single image only are nearest, before it is trained."""
    network, build = model.model, model.model.build

    @torch.no_grad()
    def build_and_drop(features: TrainingFeatures, processes: Processes) -> None:
        build(features, processes)
        bank = network.memory_bank
        images = torch.zeros(len(bank.centers))
        for pyramid in features:
            for block in network.blocks(pyramid):
                for of_image in bank.nearest(network.describe(block), 1)[1].flatten(1):
                    images[of_image.unique()] += 1
        kept = images > 1
        network.assign_bank(bank.centers[kept], bank.sources[kept])

    network.build = build_and_drop


def report(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Write the tables of finished runs."""
    if not runs:
        return
    again = [(task | {"variant": WITHOUT_NAMED}, result["again"]) for task, result in runs if "again" in result]
    measured, runs, sections = [result for _, result in runs], [*runs, *again], []
    for data in dict.fromkeys(task["data"] for task, _ in runs):
        of_set = [run for run in runs if run[0]["data"] == data]
        sections += [f"## {data}, {of_set[0][0]['normal']} normal training images", _table(of_set)]
    if len(sections) > 2:
        sections += ["## What the defective images change, on the mean over the sets", _changes(runs)]
    notes = [
        "the last epoch, raw scores; mean ± sample standard deviation over seeds, if there are several",
        "the same test images at each share; those mixed in are not among them",
        "development data: the labels decided whether a robust variant becomes this package's default, over all sets",
        f"{runs[0][0]['backbone']} with {runs[0][0]['weights']}, {runs[0][0]['size']} x {runs[0][0]['size']}",
    ]
    write_report(options.output / "dirty.md", "Dirty training sets", notes, sections, measured)


def _names(runs: Sequence[Run]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((task["model"], task["variant"]) for task, _ in runs))


def _table(runs: Sequence[Run]) -> str:
    numbers = runs[0][0]["numbers"]
    mixed = list(dict.fromkeys(numbers))
    of = [[f"{share} %" for share, number in zip(_SHARES, numbers, strict=True) if number == count] for count in mixed]
    head = [f"{' and '.join(shares)}: {count} mixed in" for shares, count in zip(of, mixed, strict=True)]
    lines = []
    for model, variant in _names(runs):
        found = {
            count: [r for t, r in runs if (t["model"], t["variant"], t["mixed"]) == (model, variant, count)]
            for count in mixed
        }
        for metric, title in METRICS.items():
            cells = [spread([result[metric] for result in found[count] if metric in result]) for count in mixed]
            if any(cells):
                lines.append([f"{', '.join(filter(None, (model, variant)))}: {title}", *cells])
        if variant == AS_TYPED:
            sums = [[sum(result[name] for result in found[count]) for name in ("right", "named")] for count in mixed]
            lines.append(["mixed in, of those it names", *(f"{right} of {named}" for right, named in sums)])
    return markdown_table(["", *head], lines)


def _changes(runs: Sequence[Run]) -> str:
    sets = list(dict.fromkeys(task["data"] for task, _ in runs))
    lines = []
    for model, variant in _names(runs):
        for metric, title in METRICS.items():
            cells = [_changes_of(runs, (model, variant), metric, share, sets) for share in range(len(_SHARES))]
            lines.append([f"{', '.join(filter(None, (model, variant)))}: {title}", *cells])
    return markdown_table(["", *(f"{share} %" for share in _SHARES)], lines)


def _changes_of(runs: Sequence[Run], name: tuple[str, str], metric: str, share: int, sets: Sequence[str]) -> str:
    """The mean over the sets of a metric's change from this Cfa, or a baseline, with its defaults on clean images."""
    changes = []
    clean = name if name[0] != CFA else (CFA, AS_TYPED)
    for data in sets:
        values = [
            [
                result[metric]
                for task, result in runs
                if (task["data"], task["model"], task["variant"]) == (data, *of) and metric in result
                if task["mixed"] == task["numbers"][place]
            ]
            for of, place in ((name, share), (clean, 0))
        ]
        if all(values):
            changes.append(mean(values[0]) - mean(values[1]))
    return f"{mean(changes):+.3f} ({len(changes)} sets)" if changes else ""


if __name__ == "__main__":
    sys.exit(answer("dirty"))
