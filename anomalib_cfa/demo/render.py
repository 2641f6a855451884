"""A small data set in MVTec AD's layout, rendered: enough to see a model train, find defects and be exported."""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalib_cfa.demo import defects, scenes
from anomalib_cfa.demo.camera import Mask, Picture, photograph
from anomalib_cfa.demo.scenes import Scene

_SMALLEST = 32


@dataclass(frozen=True)
class Category:
    """How one category looks: its normal scene, and each kind of defect under MVTec AD's name."""

    normal: Callable[[np.random.Generator, int], Scene]
    defects: dict[str, Callable[[np.random.Generator, Scene], tuple[Picture, Mask]]]


CATEGORIES = {
    "tile": Category(scenes.tile, {"crack": defects.crack, "gray_stroke": defects.gray_stroke, "oil": defects.oil}),
    "metal_nut": Category(scenes.metal_nut, {"bent": defects.bent, "color": defects.color, "scratch": defects.scratch}),
}


def render_mvtec(
    root: Path | str,
    categories: Iterable[str] = tuple(CATEGORIES),
    seed: int = 0,
    *,
    num_train: int = 48,
    num_good: int = 10,
    num_defective: int = 6,
    image_size: int = 256,
) -> Path:
    """Render categories in MVTec AD's layout, as PNG files that anomalib's ``MVTecAD`` reads.

    An image depends on the seed, its category, its folder, its number and ``image_size`` only, so that a larger data
    set holds the images of a smaller one.

    Args:
        root: Folder to write to; created if missing. Files of the same names are overwritten, others left alone.
        categories: Names from :data:`CATEGORIES`.
        seed: Seed of everything drawn, not negative.
        num_train: Number of normal training images, at least 1.
        num_good: Number of normal test images, at least 1.
        num_defective: Number of test images of each kind of defect, at least 1.
        image_size: Height and width of the images in pixels, at least 32.

    Returns:
        ``root`` as a path. It holds ``<category>/train/good``, ``<category>/test/{good,<defect>}/<number>.png`` and
        ``<category>/ground_truth/<defect>/<number>_mask.png``, each mask 0 or 255.

    Raises:
        ValueError: A category is unknown, or a number is below its minimum.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> root = render_mvtec("datasets/rendered", categories=["tile"])  # doctest: +SKIP
        >>> datamodule = MVTecAD(root, category="tile")  # doctest: +SKIP
    """
    root, categories = Path(root), list(categories)
    if unknown := sorted(set(categories) - set(CATEGORIES)):
        msg = f"categories must be among {sorted(CATEGORIES)}, but got {unknown}."
        raise ValueError(msg)
    least = {"seed": 0, "num_train": 1, "num_good": 1, "num_defective": 1, "image_size": _SMALLEST}
    given = (seed, num_train, num_good, num_defective, image_size)
    for (name, low), value in zip(least.items(), given, strict=True):
        if value < low:
            msg = f"{name} must be at least {low}, but got {value}."
            raise ValueError(msg)

    for name in categories:
        category = CATEGORIES[name]

        def generators(folder: str, count: int, name: str = name) -> list[np.random.Generator]:
            stream = zlib.crc32(f"{name}/{folder}".encode())
            return [np.random.default_rng([seed, stream, number]) for number in range(count)]

        for folder, count in (("train/good", num_train), ("test/good", num_good)):
            for number, rng in enumerate(generators(folder, count)):
                scene = category.normal(rng, image_size)
                _save(photograph(rng, scene.picture), root / name / folder / f"{number:03}.png")
        for kind, damage in category.defects.items():
            for number, rng in enumerate(generators(f"test/{kind}", num_defective)):
                picture, mask = damage(rng, category.normal(rng, image_size))
                _save(photograph(rng, picture), root / name / "test" / kind / f"{number:03}.png")
                truth = root / name / "ground_truth" / kind / f"{number:03}_mask.png"
                _save(np.where(mask, 255, 0).astype(np.uint8), truth)
    return root


def _save(image: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    if not cv2.imwrite(str(path), stored):
        msg = f"Could not write {path}."
        raise OSError(msg)
