"""Why a patch scores high: the training patch that its nearest centre came from."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomalib_cfa.lightning_model import Cfa

Place = tuple[float, float]


@dataclass(frozen=True)
class Reason:
    """What an image's worst patch was compared with.

    Attributes:
        place: The middle of the worst patch: x and y, as parts of the model's view of the image.
        normal: The training image that the nearest centre came from.
        normal_place: The middle of the patch there.
    """

    place: Place
    normal: Path
    normal_place: Place


class ReasonFinder:
    """Finds the worst patch of the image that the model predicts, and the normal patch nearest to it.

    Args:
        model: A fitted model whose memory bank knows where its centres came from.
        images: The training images, in the data set's order.
    """

    def __init__(self, model: Cfa, images: list[str]) -> None:
        self._model = model.model
        self._images = images
        self._described: list[Tensor] = []

    @classmethod
    def of(cls, model: Cfa) -> "ReasonFinder | None":
        """The finder for a model, or None for one that cannot tell: saved by 0.1.0, or with a bank of mean features."""
        images = getattr(model, "training_images", None)
        return cls(model, images) if images and len(model.model.memory_bank.sources) else None

    @contextmanager
    def watch(self) -> Iterator["ReasonFinder"]:
        """Keep what the model computes for an image on the way to its prediction."""

        def keep(module: Any, inputs: Any, output: Tensor) -> None:  # noqa: ANN401
            del module, inputs
            self._described.append(output)

        handle = self._model.descriptor.register_forward_hook(keep)
        try:
            yield self
        finally:
            handle.remove()
            self._described.clear()

    @torch.inference_mode()
    def find(self) -> Reason | None:
        """The reason for the prediction made since :meth:`watch`; None if there was none."""
        if not self._described:
            return None
        descriptors = self._described[0][0]  # the whole image's; that of its centre crop follows
        squared, indices = self._model.memory_bank.nearest(descriptors[None], 1)
        scores, indices = squared[0, ..., 0].sqrt(), indices[0, ..., 0]
        if self._model.score in {"local", "calibrated"}:
            scores = self._model.calibration(scores, indices)
        height, width = scores.shape
        row, column = divmod(int(scores.argmax()), width)
        image, normal_row, normal_column = self._model.memory_bank.sources[indices[row, column]].tolist()
        if not 0 <= image < len(self._images):
            return None
        return Reason(
            ((column + 0.5) / width, (row + 0.5) / height),
            Path(self._images[image]),
            ((normal_column + 0.5) / width, (normal_row + 0.5) / height),
        )
