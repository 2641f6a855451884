"""Normal objects: a texture (``tile``) and a part (``metal_nut``), under the names of MVTec AD's categories."""

from dataclasses import dataclass

import numpy as np

from anomalib_cfa.demo.camera import Field, Mask, Picture, blend, grid, noise, step


@dataclass(frozen=True)
class Scene:
    """What lies before the camera."""

    picture: Picture  # RGB in [0, 1], float32 of shape (size, size, 3)
    surface: Mask  # where the object is and a defect may be, bool of shape (size, size)


def tile(rng: np.random.Generator, size: int) -> Scene:
    """Polished stone: pale ground, dark and light speckles of two sizes, no two pieces alike."""
    unit = size / 256
    picture = np.empty((size, size, 3), dtype=np.float32)
    picture[:] = (0.64, 0.62, 0.59)
    picture += 0.025 * noise(rng, size, 20 * unit)[..., None] + 0.02 * noise(rng, size, 0.8 * unit)[..., None]
    for sigma, threshold, colour, opacity in (
        (3.2, 1.0, (0.42, 0.41, 0.40), 0.7),
        (2.0, 1.3, (0.82, 0.80, 0.77), 0.8),
        (1.4, 1.5, (0.22, 0.21, 0.22), 0.9),
    ):
        speckles = step(noise(rng, size, sigma * unit) - threshold, 0.25)
        picture = blend(picture, colour, opacity * speckles)
    return Scene(picture, np.ones((size, size), dtype=bool))


def metal_nut(rng: np.random.Generator, size: int) -> Scene:
    """A turned metal nut with four lobes on dark cloth, never lying quite the same."""
    y, x = _posed_grid(rng, size)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    softness = 3 / size

    def inside(limit: Field | float) -> Field:
        return step(np.asarray(limit - radius, dtype=np.float32), softness)

    rim = np.asarray(0.66 + 0.1 * np.tanh(2.5 * np.cos(4 * angle)), dtype=np.float32)
    body = inside(rim) * (1 - inside(0.27))

    # Turning leaves rings: noise that depends on the radius alone, and shines where it faces the light.
    rings = np.interp(radius, np.linspace(0, 1.5, 400), rng.standard_normal(400)).astype(np.float32)
    gleam = np.abs(np.cos(angle - 0.8)) ** 6
    grey = 0.52 + 0.2 * gleam + (0.02 + 0.035 * gleam) * rings + 0.02 * noise(rng, size, 1.2 * size / 256)
    collar = inside(0.40) * (1 - inside(0.365))
    bevel = inside(rim) * (1 - inside(rim - 0.05))
    facing = np.cos(angle + 2.2)  # edges turned to the lamp are bright, the others dark
    grey = grey + 0.22 * facing * bevel - 0.25 * facing * collar
    metal = np.stack([grey * 1.0, grey * 0.985, grey * 0.95], axis=-1).astype(np.float32)

    cloth = 0.10 + 0.02 * noise(rng, size, 0.9) + 0.015 * noise(rng, size, 18 * size / 256)
    shadow = 0.05 * step(np.asarray(rim + 0.07 - radius, dtype=np.float32), 0.08)
    ground = np.repeat((cloth - shadow)[..., None], 3, axis=-1).astype(np.float32)
    return Scene(blend(ground, metal, body), body > 0.5)  # half covered


def _posed_grid(rng: np.random.Generator, size: int) -> tuple[Field, Field]:
    """Coordinates in the frame of an object that is slightly shifted, turned and scaled."""
    y, x = grid(size)
    shift_y, shift_x = rng.normal(0, 0.015, 2)
    turn, scale = rng.normal(0, np.deg2rad(4)), rng.normal(1, 0.01)
    y, x = (y - shift_y) / scale, (x - shift_x) / scale
    cos, sin = np.cos(turn), np.sin(turn)
    return np.asarray(cos * y + sin * x, dtype=np.float32), np.asarray(cos * x - sin * y, dtype=np.float32)
