"""Pictures as arrays, and what light, lens and sensor do to them.

A picture is a float32 array of shape (size, size, 3), RGB in [0, 1]; a mask is a bool array of shape (size, size).
Everything drawn comes from the generator that is passed in, so a seed fixes every pixel.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]
Field = NDArray[np.float32]
Mask = NDArray[np.bool_]


def grid(size: int) -> tuple[Field, Field]:
    """Pixel coordinates y and x, each of shape (size, size), from -1 to 1."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return y, x


def noise(rng: np.random.Generator, size: int, sigma: float, sigma_x: float | None = None) -> Field:
    """Smooth Gaussian noise of unit variance, in spots of ``sigma`` pixels; of ``sigma_x`` along x if it is given."""
    margin = int(3 * max(sigma, sigma_x or 0)) + 1  # blurred wider and cut, so the border looks like the middle
    white = rng.standard_normal((size + 2 * margin, size + 2 * margin), dtype=np.float32)
    smooth = cv2.GaussianBlur(white, (0, 0), sigmaX=sigma if sigma_x is None else sigma_x, sigmaY=sigma)
    smooth = smooth[margin:-margin, margin:-margin]
    return np.asarray((smooth - smooth.mean()) / smooth.std(), dtype=np.float32)


def step(field: Field, width: float) -> Field:
    """Soft threshold at zero: 0 below ``-width``, 1 above ``width``, smooth between."""
    t = np.clip(field / (2 * width) + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def blend(picture: Picture, colour: Field | tuple[float, float, float], opacity: Field) -> Picture:
    """Paint ``colour`` over ``picture`` with an opacity of shape (size, size) in [0, 1]."""
    alpha = opacity[..., None]
    return np.asarray(picture * (1 - alpha) + np.asarray(colour, dtype=np.float32) * alpha, dtype=np.float32)


def photograph(rng: np.random.Generator, picture: Picture) -> NDArray[np.uint8]:
    """Take the picture: uneven light, exposure, vignetting, blur, shot and read noise; RGB in uint8."""
    size = len(picture)
    y, x = grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + 0.06 * (np.cos(angle) * x + np.sin(angle) * y) - 0.05 * (x * x + y * y)
    exposure = rng.normal(1, 0.025)
    seen = cv2.GaussianBlur(picture * (light * exposure)[..., None], (0, 0), sigmaX=0.6 * size / 256)
    seen = np.clip(seen, 0, 1)
    seen += rng.standard_normal(seen.shape, dtype=np.float32) * np.sqrt(0.004**2 + 0.012**2 * seen)
    return np.asarray(np.clip(seen, 0, 1) * 255 + 0.5, dtype=np.uint8)
