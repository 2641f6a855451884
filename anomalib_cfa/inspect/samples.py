"""A folder -> the images to inspect, with what is known of them."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_cfa.inspect.pictures import View, crop

_NORMAL = "good"


@dataclass(frozen=True)
class Sample:
    """An image to inspect."""

    path: Path  # its file
    name: str  # its path within the folder inspected, with slashes
    kind: str = ""  # the kind of its defect, ``"good"`` for a normal image; empty where that is not known
    defective: bool | None = None  # whether it has a defect; None where that is not known
    mask: Path | None = None  # file of the defect's true mask, where there is one

    def read_mask(self, size: tuple[int, int], view: View) -> NDArray[np.bool_] | None:
        """Read the true mask of the part of the image that a view shows, in a size (height, width).

        It is nowhere true for a normal image, and None if it is not known.
        """
        if self.mask is not None:
            with Image.open(self.mask) as mask:
                part = crop(mask.convert("L"), view)
                return np.asarray(part.resize(size[::-1], Image.Resampling.NEAREST)) > 0
        return np.zeros(size, dtype=bool) if self.defective is False else None


def find_samples(folder: Path) -> list[Sample]:
    """List the images of a folder, sorted by name.

    Args:
        folder: Images at any depth, or a category in MVTec AD's layout, whose test split is used:
            ``test/good``, ``test/<kind of defect>`` and ``ground_truth/<kind of defect>/<name>_mask.png``.

    Raises:
        ValueError: If there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        msg = f"folder must be an existing folder, but is {str(folder)!r}"
        raise ValueError(msg)
    root = folder / "test" if (folder / "test").is_dir() else folder
    labelled = (root / _NORMAL).is_dir()
    samples = []
    for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file()):
        place = path.relative_to(root)
        if labelled and len(place.parts) > 1:
            kind = place.parts[0]
            mask = root.parent / "ground_truth" / place.with_name(f"{path.stem}_mask.png")
            known = mask if mask.is_file() else None
            samples.append(Sample(path, place.as_posix(), kind, kind != _NORMAL, known))
        else:
            samples.append(Sample(path, place.as_posix()))
    if not samples:
        msg = f"folder must hold images, but {str(folder)!r} holds none of {', '.join(IMG_EXTENSIONS)}"
        raise ValueError(msg)
    return samples


def listed_samples(table: pd.DataFrame) -> list[Sample]:
    """The images of an anomalib data set, whose ``samples`` may lack ``label`` and ``mask_path``."""
    paths = [Path(path) for path in table["image_path"]]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    kinds = table["label"] if "label" in table else [""] * len(paths)
    masks = table["mask_path"] if "mask_path" in table else [""] * len(paths)
    rows = zip(paths, kinds, table["label_index"], masks, strict=True)
    samples = [
        Sample(path, path.relative_to(root).as_posix(), str(kind), bool(label), _mask_file(mask) if label else None)
        for path, kind, label, mask in rows
    ]
    return sorted(samples, key=lambda sample: sample.name)


def _mask_file(path: object) -> Path | None:
    return Path(path) if isinstance(path, str) and path and Path(path).is_file() else None
