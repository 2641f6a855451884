"""Keeps the frozen backbone's features on disk, for all runs of an ablation that share backbone and weights."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anomalib_cfa import Cfa


class FeatureCache:
    """Pooled feature maps by what the image holds: one file for each image and layer.

    They are kept in half precision, as a fit keeps those of its training images.

    Args:
        folder: Where to.
        weights: Says whose features they are.
    """

    def __init__(self, folder: Path, weights: str) -> None:
        self.folder = folder
        self.weights = weights
        folder.mkdir(parents=True, exist_ok=True)

    def attach(self, model: Cfa) -> None:
        """Let a model on the CPU take its features from here."""
        features: Any = model.model.patch_features
        compute: Callable[[Tensor], list[Tensor]] = features.forward
        features.forward = lambda images: self._pyramid(images, features.layers, compute)

    def _pyramid(
        self, images: Tensor, layers: Sequence[str], compute: Callable[[Tensor], list[Tensor]]
    ) -> list[Tensor]:
        if images.device.type == "meta":  # only asks for shapes
            return compute(images)
        files = [[self._file(image, layer) for layer in layers] for image in images]
        missing = [i for i, of_image in enumerate(files) if not all(file.exists() for file in of_image)]
        if missing:
            for i, *maps in zip(missing, *compute(images[missing]), strict=True):
                for file, features in zip(files[i], maps, strict=True):
                    partial = file.with_suffix(".partial.npy")
                    np.save(partial, features.half().numpy())
                    partial.replace(file)
        return [
            torch.stack([torch.from_numpy(np.load(of_image[level])).float() for of_image in files])
            for level in range(len(layers))
        ]

    def _file(self, image: Tensor, layer: str) -> Path:
        digest = hashlib.blake2b(f"{self.weights}/{layer}".encode(), digest_size=16)
        digest.update(image.contiguous().numpy().tobytes())
        return self.folder / f"{digest.hexdigest()}.npy"
