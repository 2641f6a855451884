"""Calibration of the score: what distance is usual at each centre of the memory bank."""

from collections.abc import Callable
from typing import Any

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor

_PSEUDO_COUNT = 10  # patches' worth of weight given to the mean and variance of all centres


class CenterCalibration(DynamicBufferMixin):
    """Relates a patch's distance to what is usual for normal patches at the same centre.

    Training draws patches towards their centres, but not all to the same distance: where normal images vary, they stay
    further out. A single scale for all centres scores such places high on every image. Here each centre has its own
    mean and deviation, of the distances of those training patches to which it is the nearest, and a score counts
    deviations. Both are drawn towards those of all patches, the more so the fewer patches a centre has.

    Example:
        >>> calibration = CenterCalibration()
        >>> calibration.reset(centers=1)
        >>> calibration.update(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]))
        >>> calibration.finish()
        >>> calibration(torch.tensor([2.0, 3.0]), torch.tensor([0, 0]))
        tensor([0., 1.])
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(0))
        self.register_buffer("deviation", torch.empty(0))
        self._sums: Tensor | None = None  # count, sum and sum of squares at each centre

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sums": None}

    def reset(self, centers: int) -> None:
        """Forget everything: distances count as they are until :meth:`finish`.

        Args:
            centers: Size N of the memory bank.
        """
        self.mean = self.mean.new_zeros(centers)
        self.deviation = self.deviation.new_ones(centers)
        self.restart()

    def restart(self) -> None:
        """Begin to take in distances anew, and keep what is known until then."""
        self._sums = torch.zeros(3, len(self.mean), dtype=torch.float64, device=self.mean.device)

    @torch.no_grad()
    def update(self, distances: Tensor, indices: Tensor) -> None:
        """Take in normal patches.

        Args:
            distances: Distance of each patch to its nearest centre, of any shape.
            indices: The index of that centre, of the same shape.
        """
        if self._sums is None:
            self.restart()
        assert self._sums is not None
        values, indices = distances.detach().flatten().double(), indices.flatten()
        for sums, value in zip(self._sums, (torch.ones_like(values), values, values.square()), strict=True):
            sums.index_add_(0, indices, value)

    def finish(self, total: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Compute mean and deviation from all that was taken in since :meth:`restart`; nothing changes if none was.

        Args:
            total: Sums a tensor over all processes.
        """
        if self._sums is None:
            return
        sums = total(self._sums.clone())
        counts, distances, squares = sums
        count = counts.sum()
        if count == 0:
            return
        scatter = (squares - distances.square() / counts.clamp(min=1)).clamp(min=0)
        mean = (distances + _PSEUDO_COUNT * distances.sum() / count) / (counts + _PSEUDO_COUNT)
        variance = (scatter + _PSEUDO_COUNT * scatter.sum() / count) / (counts + _PSEUDO_COUNT)
        self.mean = mean.to(self.mean.dtype)
        self.deviation = variance.clamp(min=1e-12).sqrt().to(self.deviation.dtype)

    def forward(self, distances: Tensor, indices: Tensor) -> Tensor:
        """Score patches, in deviations above what is usual at their centre.

        Args:
            distances: Distance of each patch to its nearest centre, of any shape.
            indices: The index of that centre, of the same shape.

        Returns:
            Scores of the same shape.
        """
        return (distances - self.mean[indices]) / self.deviation[indices]
