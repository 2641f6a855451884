"""Defects: each takes a normal scene and returns the damaged picture with the mask of what it changed."""

from collections.abc import Callable
from functools import wraps

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalib_cfa.demo.camera import Field, Mask, Picture, blend, grid, noise, step
from anomalib_cfa.demo.scenes import Scene

_VISIBLE = 0.25
"""Opacity from which a pixel counts as defective in the mask."""


Defect = Callable[[np.random.Generator, Scene], tuple[Picture, Mask]]


def _visible(defect: Defect) -> Defect:
    """Draw a thin defect again while none of it shows on the surface, which happens to one in thousands."""

    @wraps(defect)
    def draw(rng: np.random.Generator, scene: Scene) -> tuple[Picture, Mask]:
        picture, mask = defect(rng, scene)
        while not mask.any():
            picture, mask = defect(rng, scene)
        return picture, mask

    return draw


@_visible
def crack(rng: np.random.Generator, scene: Scene) -> tuple[Picture, Mask]:
    """A thin dark line that wanders over the surface and has one bright edge."""
    size = len(scene.picture)
    path = _walk(rng, scene, length=rng.uniform(0.45, 0.8), bend=0.35)
    dark = _line(size, path, width=rng.uniform(1.6, 2.6) * size / 256)
    bright = np.roll(dark, (1, 1), axis=(0, 1))
    picture = blend(scene.picture, (0.9, 0.88, 0.85), 0.35 * bright)
    return blend(picture, (0.12, 0.11, 0.11), 0.85 * dark), _mask(np.maximum(dark, bright), scene)


def oil(rng: np.random.Generator, scene: Scene) -> tuple[Picture, Mask]:
    """A brownish stain that the surface still shows through, darker at its border."""
    inside = _blob(rng, scene, radius=rng.uniform(0.13, 0.24))
    border = inside * (1 - _blur(inside, 5))
    stained = scene.picture * np.array([0.80, 0.72, 0.55], dtype=np.float32)
    picture = blend(scene.picture, stained, inside)
    return blend(picture, (0.30, 0.24, 0.16), np.clip(0.9 * border, 0, 1)), _mask(inside, scene)


def gray_stroke(rng: np.random.Generator, scene: Scene) -> tuple[Picture, Mask]:
    """The grey smear of a wide brush, with gaps between its bristles."""
    size = len(scene.picture)
    path = _walk(rng, scene, length=rng.uniform(0.35, 0.6), bend=0.08)
    stroke = _blur(_line(size, path, width=rng.uniform(12, 20) * size / 256), 1.5)
    bristles = 0.75 + 0.25 * step(noise(rng, size, 1.5) + 0.5, 0.8)
    return blend(scene.picture, (0.46, 0.46, 0.48), 0.85 * stroke * bristles), _mask(stroke, scene)


@_visible
def scratch(rng: np.random.Generator, scene: Scene) -> tuple[Picture, Mask]:
    """Two to four bright scratches with dark flanks, side by side."""
    size = len(scene.picture)
    path = _walk(rng, scene, length=rng.uniform(0.25, 0.4), bend=0.05)
    across = rng.normal(0, 1, 2)
    bright = np.zeros((size, size), dtype=np.float32)
    for _ in range(rng.integers(2, 5)):
        offset = rng.normal(0, 4) * size / 256 * across / np.linalg.norm(across)
        bright = np.maximum(bright, _line(size, path + offset, width=rng.uniform(1.0, 2.0) * size / 256))
    bright = bright * scene.surface
    flank = np.roll(bright, (2, 0), axis=(0, 1)) * scene.surface
    picture = blend(scene.picture, (0.2, 0.2, 0.2), 0.5 * flank)
    return blend(picture, (0.95, 0.95, 0.93), 0.8 * bright), _mask(np.maximum(bright, flank), scene)


def color(rng: np.random.Generator, scene: Scene) -> tuple[Picture, Mask]:
    """A splash of red, blue or rusty paint."""
    paint = ((0.55, 0.16, 0.13), (0.16, 0.24, 0.52), (0.50, 0.30, 0.12))[rng.integers(3)]
    inside = _blob(rng, scene, radius=rng.uniform(0.07, 0.13)) * scene.surface
    return blend(scene.picture, paint, 0.75 * inside), _mask(inside, scene)


def bent(rng: np.random.Generator, scene: Scene) -> tuple[Picture, Mask]:
    """The rim pushed inwards at one place; the mask is where the outline or the picture moved."""
    size = len(scene.picture)
    y, x = grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    direction = np.array([np.sin(angle), np.cos(angle)], dtype=np.float32)
    along = np.linspace(0, 1, size) * size / 2
    ray = (size / 2 + along[:, None] * direction).astype(int).clip(0, size - 1)
    rim = ray[np.flatnonzero(scene.surface[ray[:, 0], ray[:, 1]]).max(initial=0)] * 2 / size - 1
    push = np.exp(-((y - rim[0]) ** 2 + (x - rim[1]) ** 2) / (2 * rng.uniform(0.10, 0.14) ** 2))
    amount = rng.uniform(12, 20) * size / 256 * push
    rows, columns = np.indices((size, size), dtype=np.float32)
    map_x, map_y = (columns + amount * direction[1]), (rows + amount * direction[0])
    picture = cv2.remap(
        scene.picture,
        map_x.astype(np.float32),
        map_y.astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )
    moved = np.abs(picture - scene.picture).max(axis=-1).astype(np.float32)
    return np.asarray(picture, dtype=np.float32), _blur(moved, 2.0) > 0.06  # above the sensor's noise


def _place(rng: np.random.Generator, scene: Scene) -> NDArray[np.float32]:
    """A random pixel (row, column) of the surface, away from the image's border."""
    size = len(scene.picture)
    y, x = grid(size)
    places = np.argwhere(scene.surface & (np.maximum(np.abs(y), np.abs(x)) < 0.75))
    return np.asarray(places[rng.integers(len(places))], dtype=np.float32)


def _walk(rng: np.random.Generator, scene: Scene, length: float, bend: float) -> NDArray[np.float32]:
    """Points (row, column) of a path of ``length`` times the image's side, that turns by ``bend`` radians a step."""
    count = 24
    headings = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend, count))
    moves = np.stack([np.sin(headings), np.cos(headings)], axis=-1) * length * len(scene.picture) / count
    path = np.cumsum(moves, axis=0)
    return np.asarray(path - path.mean(axis=0) + _place(rng, scene), dtype=np.float32)


def _line(size: int, path: NDArray[np.float32], width: float) -> Field:
    """Opacity of a smooth line through the points (row, column) of ``path``, at most ``width`` pixels wide."""
    scale = 4  # drawn larger and shrunk, for smooth edges
    canvas = np.zeros((size * scale, size * scale), dtype=np.uint8)
    points = np.round(path[:, None, ::-1] * scale).astype(np.int32)
    cv2.polylines(canvas, [points], isClosed=False, color=255, thickness=max(1, round(width * scale)))
    small = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(small / 255, dtype=np.float32)


def _blob(rng: np.random.Generator, scene: Scene, radius: float) -> Field:
    """Opacity of a ragged spot, ``radius`` times the image's side."""
    size = len(scene.picture)
    row, column = _place(rng, scene)
    rows, columns = np.indices((size, size), dtype=np.float32)
    distance = np.hypot(rows - row, columns - column) / (radius * size)
    ragged = 1 - distance + 0.22 * noise(rng, size, 0.35 * radius * size)
    return step(np.asarray(ragged, dtype=np.float32), 0.08)


def _blur(field: Field, sigma: float) -> Field:
    return np.asarray(cv2.GaussianBlur(field, (0, 0), sigmaX=sigma * len(field) / 256), dtype=np.float32)


def _mask(opacity: Field, scene: Scene) -> Mask:
    return np.asarray((opacity > _VISIBLE) & scene.surface, dtype=bool)
