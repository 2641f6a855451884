"""Lays out a validation set that needs no test image: held-out normal images, and the same with synthetic defects."""

import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from anomalib.data import Folder
from synthetic_defects import KINDS

FOLDS = 5
_BLOCKS_PER_FOLD = 5
_SLACK = 8  # images by which a block's border may move to the largest gap between numbers


def lay_out(images: Sequence[Path], folder: Path, fold: int) -> None:
    """Split normal images, and make the validation set, once.

    The folder then holds ``train/good``, ``test/good``, and for each kind of defect ``test/<kind>`` with
    ``ground_truth/<kind>``. Every held-out image is there as it is, and once with a defect of each kind.

    Args:
        images: Normal images of the training side.
        folder: Where to.
        fold: Which fifth is held out.
    """
    complete = folder / f"complete-{'-'.join(KINDS)}"
    if complete.exists():
        return
    training, held_out = split(images, fold)
    for part, paths in (("train/good", training), ("test/good", held_out)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for path in paths:
            link = folder / part / path.name
            if not link.exists():
                link.symlink_to(path.resolve())
    for kind in KINDS:
        (folder / "test" / kind).mkdir(parents=True, exist_ok=True)
        (folder / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(held_out):
        image = np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB), dtype=np.uint8)
        for kind, damage in KINDS.items():
            damaged, mask = damage(np.random.default_rng([fold, number]), image, number)
            for part, picture in (("test", damaged), ("ground_truth", mask)):
                cv2.imwrite(str(folder / part / kind / f"{number:04}.png"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    complete.touch()


def split(images: Sequence[Path], fold: int) -> tuple[list[Path], list[Path]]:
    """Hold out every fifth of 25 runs of neighbouring images.

    Images are ordered by the last number in their names. Neighbours may be photographs of one object, which must not
    come apart, so a border lies at the largest gap between numbers that is near.
    """
    ordered = sorted(images, key=lambda path: (_number(path), path.name))
    numbers = [_number(path) for path in ordered]
    count = FOLDS * _BLOCKS_PER_FOLD
    borders = [0]
    for block in range(1, count):
        nominal = block * len(ordered) // count
        slack = min(_SLACK, len(ordered) // count // 2)
        near = range(max(borders[-1] + 1, nominal - slack), min(len(ordered), nominal + slack + 1))
        borders.append(max(near, key=lambda i: (numbers[i] - numbers[i - 1], -abs(i - nominal)), default=nominal))
    borders.append(len(ordered))
    held_out = {i for block in range(fold % FOLDS, count, FOLDS) for i in range(borders[block], borders[block + 1])}
    return (
        [path for i, path in enumerate(ordered) if i not in held_out],
        [path for i, path in enumerate(ordered) if i in held_out],
    )


def _number(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else 0


def datamodule(folder: Path, batch_size: int) -> Folder:
    """Anomalib's data module of a folder in MVTec AD's layout, whatever its images' format."""
    kinds = sorted(path.name for path in (folder / "test").iterdir() if path.is_dir() and path.name != "good")
    module = Folder(
        name=folder.name,
        root=folder,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{kind}" for kind in kinds],
        mask_dir=[f"ground_truth/{kind}" for kind in kinds],
        train_batch_size=batch_size,
        eval_batch_size=8,
        num_workers=0,
        val_split_mode="none",
    )
    module.setup()
    return module
