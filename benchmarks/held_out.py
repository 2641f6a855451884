"""Lays out a validation set that needs no test image: held-out normal images, and the same with synthetic defects."""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from anomalib.data import Folder
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from numpy.typing import NDArray

from anomalib_cfa.demo import defects
from anomalib_cfa.demo.camera import Field, blend, grid, noise, step
from anomalib_cfa.demo.camera import Picture as Colours
from anomalib_cfa.demo.scenes import Scene

FOLDS = 5
_BLOCKS_PER_FOLD = 5
_SLACK = 8  # images by which a block's border may move to the largest gap between numbers
_DRAWN = (defects.crack, defects.gray_stroke, defects.oil, defects.scratch)
_VISIBLE = 0.25  # opacity from which a pixel counts as defective
Picture = NDArray[np.uint8]


def lay_out(images: Sequence[Path], folder: Path, fold: int) -> None:
    """Split normal images, and make the validation set, once.

    The folder then holds ``train/good``, ``test/good``, and for each kind of defect ``test/<kind>`` with
    ``ground_truth/<kind>``. Every held-out image is there three times: as it is, and with a defect of each kind.

    Args:
        images: Normal images of the training side.
        folder: Where to.
        fold: Which fifth is held out.
    """
    if (folder / "complete").exists():
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
    (folder / "complete").touch()


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


def perlin(rng: np.random.Generator, image: Picture, number: int) -> tuple[Picture, Picture]:
    """Mix noise into patches, as anomalib's ``SyntheticAnomalyDataset`` does, but not as faintly.

    Anomalib's opacity of 0.01 to 0.2 is below what any variant sees on a coarse texture.

    Args:
        rng: Source of randomness.
        image: RGB of shape (H, W, 3).
        number: Not used.

    Returns:
        The image and its mask, 0 or 255, both of shape (H, W, 3).
    """
    del number
    seed = int(rng.integers(2**31))
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - anomalib's generator draws from the global ones
    torch.manual_seed(seed)
    generate = PerlinAnomalyGenerator(probability=1.0, blend_factor=(0.05, 0.5))
    before = torch.from_numpy(image).permute(2, 0, 1) / 255
    after, mask = generate(before)
    damaged = _quantised(after.permute(1, 2, 0).numpy(), image)
    return damaged, np.repeat(np.where(mask[0, ..., None] > 0, 255, 0), 3, axis=-1).astype(np.uint8)


def draw(rng: np.random.Generator, image: Picture, number: int) -> tuple[Picture, Picture]:
    """Draw one of the demo's defects, faintly, into a square part of an image; the kinds take turns.

    Args:
        rng: Source of randomness.
        image: RGB of shape (H, W, 3).
        number: Chooses the kind of defect.

    Returns:
        The image and its mask, 0 or 255, both of shape (H, W, 3).
    """
    window, side = _square(rng, image)
    before = (image[window] / 255).astype(np.float32)
    after, mask = _DRAWN[number % len(_DRAWN)](rng, Scene(before, np.ones((side, side), dtype=bool)))
    opacity = rng.uniform(0.3, 0.7)
    damaged, truth = image.copy(), np.zeros_like(image)
    damaged[window] = _quantised((1 - opacity) * before + opacity * after, image)
    truth[window] = np.where(mask, 255, 0)[..., None]
    return damaged, truth


def spread(rng: np.random.Generator, image: Picture, number: int) -> tuple[Picture, Picture]:
    """Change the surface itself over a wide part with a soft edge: light, contrast, sharpness and shape take turns.

    What perlin noise and drawn defects leave out: nothing is added, and no edge gives the place away.

    Args:
        rng: Source of randomness.
        image: RGB of shape (H, W, 3).
        number: Chooses what is changed.

    Returns:
        The image and its mask, 0 or 255, both of shape (H, W, 3).
    """
    window, side = _square(rng, image)
    before = (image[window] / 255).astype(np.float32)
    change = (_shade, _fade, _soften, _warp)[number % 4]
    opacity = _soft_spot(rng, side)
    damaged, truth = image.copy(), np.zeros_like(image)
    damaged[window] = _quantised(blend(before, change(rng, before), opacity), image)
    truth[window] = np.where(opacity > _VISIBLE, 255, 0)[..., None]
    return damaged, truth


def _soft_spot(rng: np.random.Generator, side: int) -> Field:
    y, x = grid(side)
    centre_y, centre_x = rng.uniform(-0.6, 0.6, 2)
    radius = rng.uniform(0.35, 0.8)
    ragged = 1 - np.hypot(y - centre_y, x - centre_x) / radius + 0.3 * noise(rng, side, 0.12 * side)
    return step(np.asarray(ragged, dtype=np.float32), 0.4)


def _shade(rng: np.random.Generator, picture: Colours) -> Colours:
    return picture * np.float32(1 + rng.choice([-1, 1]) * rng.uniform(0.15, 0.35))


def _fade(rng: np.random.Generator, picture: Colours) -> Colours:
    mean = picture.mean(axis=(0, 1))
    return mean + (picture - mean) * np.float32(rng.uniform(0.3, 0.6))


def _soften(rng: np.random.Generator, picture: Colours) -> Colours:
    sigma = rng.uniform(1.5, 3) * len(picture) / 256
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigmaX=sigma), dtype=np.float32)


def _warp(rng: np.random.Generator, picture: Colours) -> Colours:
    side = len(picture)
    rows, columns = np.indices((side, side), dtype=np.float32)
    amount = rng.uniform(3, 6) * side / 256
    map_y, map_x = (axis + amount * noise(rng, side, 6 * side / 256) for axis in (rows, columns))
    warped = cv2.remap(picture, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(warped, dtype=np.float32)


def _square(rng: np.random.Generator, image: Picture) -> tuple[tuple[slice, slice], int]:
    """A square part of an image, as large as it can be, and its side."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    return np.s_[top : top + side, left : left + side], side


def _quantised(picture: NDArray[np.float32], like: Picture) -> Picture:
    """A picture as it is stored; grey if another one is."""
    if (like == like[..., :1]).all():
        picture = np.repeat(picture.mean(axis=-1, keepdims=True), 3, axis=-1)
    return np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8)


KINDS: dict[str, Callable[[np.random.Generator, Picture, int], tuple[Picture, Picture]]] = {
    "perlin": perlin,
    "drawn": draw,
    "spread": spread,
}


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
