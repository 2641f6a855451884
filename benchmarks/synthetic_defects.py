"""Synthetic defects for normal images: what an ablation is judged by where no test image may be looked at."""

import random
from collections.abc import Callable

import cv2
import numpy as np
import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from numpy.typing import NDArray

from anomalib_cfa.demo import defects
from anomalib_cfa.demo.camera import Field, blend, grid, noise, step
from anomalib_cfa.demo.camera import Picture as Colours
from anomalib_cfa.demo.scenes import Scene

_DRAWN = (defects.crack, defects.gray_stroke, defects.oil, defects.scratch)
_VISIBLE = 0.25  # opacity from which a pixel counts as defective
Picture = NDArray[np.uint8]


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
