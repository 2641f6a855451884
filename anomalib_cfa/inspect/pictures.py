"""Images, heat maps and masks -> WebP."""

from base64 import b64encode
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL = 160
"""Longer side of a thumbnail, in pixels."""
PICTURE = 640
"""Longer side of a picture beside the page, in pixels."""
EMBEDDED_PICTURE = 400
"""Longer side of a picture within the page, in pixels: a thousand of them stay below 60 MB."""
LEVELS = 255
"""Grey level of the highest score of a heat map."""

View = tuple[float, float, float, float]


def read_rgb(path: Path) -> Image.Image:
    """Read an image as RGB."""
    with Image.open(path) as file:
        return file.convert("RGB")


def crop(image: Image.Image, view: View | None) -> Image.Image:
    """Cut out what the model sees: left, top, right and bottom, as parts of the image's width and height. None: all."""
    if view is None:
        return image
    sides = (image.width, image.height) * 2
    left, top, right, bottom = (round(part * side) for part, side in zip(view, sides, strict=True))
    return image.crop((left, top, right, bottom))


def shrunk(image: Image.Image, longest: int) -> Image.Image:
    """The image with sides of at most ``longest`` pixels."""
    small = image.copy()
    small.thumbnail((longest, longest), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return small


def webp(image: Image.Image, quality: int = 80) -> bytes:
    """Encode a picture with lossy compression."""
    file = BytesIO()
    image.save(file, "WEBP", quality=quality, method=2)
    return file.getvalue()


def grey_webp(values: NDArray[np.uint8]) -> bytes:
    """Encode grey levels of shape (H, W) losslessly."""
    file = BytesIO()
    Image.fromarray(values).convert("RGB").save(file, "WEBP", lossless=True, quality=20, method=1)
    return file.getvalue()


def grey_levels(anomaly_map: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Grey levels of a map, the same on every image: 0 for a score of 0, and :data:`LEVELS` for 1."""
    levels: NDArray[np.uint8] = np.rint((LEVELS * anomaly_map).clip(0, LEVELS)).astype(np.uint8)
    return levels


def data_uri(encoded: bytes) -> str:
    """WebP as an address that holds it."""
    return "data:image/webp;base64," + b64encode(encoded).decode("ascii")


def patch_picture(image: Image.Image, place: tuple[float, float]) -> bytes:
    """A square of a quarter of the shorter side around a place (x, y), in parts of the width and the height."""
    side = max(min(image.size) // 4, 1)
    left, top = (
        min(max(round(part * length - side / 2), 0), length - side)
        for part, length in zip(place, image.size, strict=True)
    )
    return webp(image.crop((left, top, left + side, top + side)).resize((THUMBNAIL, THUMBNAIL)))
