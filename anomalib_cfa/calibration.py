"""Calibration of the score: what distance is usual at each centre of the memory bank and each place of the image."""

from collections.abc import Callable
from typing import Any

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

_PSEUDO_COUNT = (
    10  # patches' worth of weight given to the mean and variance of all centres, and to no offset at a place
)
_IMAGES_FOR_OFFSETS = 256  # of each process, whose patches are held until the end of the epoch


class ScoreCalibration(DynamicBufferMixin):
    """Relates a patch's distance to what is usual for normal patches at the same centre and the same place.

    Training draws patches towards their centres, but not all to the same distance: where normal images vary, they stay
    further out. A single scale for all centres scores such patches high on every image. Here each centre has its own
    mean and deviation, of the distances of those training patches to which it is the nearest, and a score counts
    deviations. Both are drawn towards those of all patches, the more so the fewer patches a centre has.

    What is left differs by place: at the border, where the backbone sees its padding, and wherever light or parts vary
    in the same place of each image. The mean score of the training images at each place is taken off.

    Example:
        >>> calibration = ScoreCalibration()
        >>> calibration.reset(centers=1)
        >>> calibration.update(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0, 0]]]))
        >>> calibration.finish()
        >>> calibration(torch.tensor([[[2.0, 3.0]]]), torch.tensor([[[0, 0]]]))
        tensor([[[0., 1.]]])
    """

    mean: Tensor
    deviation: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(0))
        self.register_buffer("deviation", torch.empty(0))
        self.register_buffer("offset", torch.zeros(1, 1))
        self._sums: Tensor | None = None  # count, sum and sum of squares at each centre
        self._patches: list[tuple[Tensor, Tensor]] = []  # of some images, as each needs what all say of its centre

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sums": None, "_patches": []}

    def reset(self, centers: int, grid: tuple[int, int] = (1, 1)) -> None:
        """Forget everything: distances count as they are until :meth:`finish`.

        Args:
            centers: Size N of the memory bank.
            grid: Places h x w of an image that have an offset of their own.
        """
        self.mean = self.mean.new_zeros(centers)
        self.deviation = self.deviation.new_ones(centers)
        self.offset = self.offset.new_zeros(grid)
        self.restart()

    def restart(self) -> None:
        """Begin to take in distances anew, and keep what is known until then."""
        self._sums = torch.zeros(3, len(self.mean), dtype=torch.float64, device=self.mean.device)
        self._patches = []

    @torch.no_grad()
    def update(self, distances: Tensor, indices: Tensor) -> None:
        """Take in the patches of normal images.

        Args:
            distances: Distance of each patch to its nearest centre, of shape (B, h, w).
            indices: The index of that centre, of the same shape.
        """
        if self._sums is None:
            self.restart()
        assert self._sums is not None
        distances = distances.detach()
        if sum(len(held) for held, _ in self._patches) < _IMAGES_FOR_OFFSETS:
            self._patches.append((distances.float(), indices.int()))
        values = distances.flatten().double()
        for sums, value in zip(self._sums, (torch.ones_like(values), values, values.square()), strict=True):
            sums.index_add_(0, indices.flatten(), value)

    @torch.no_grad()
    def finish(self, total: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Compute all from what was taken in since :meth:`restart`; nothing changes if none was.

        Args:
            total: Sums a tensor over all processes.
        """
        if self._sums is None:
            return
        counts, distances, squares = total(self._sums.clone())
        count = counts.sum()
        if count == 0:
            return
        scatter = (squares - distances.square() / counts.clamp(min=1)).clamp(min=0)
        mean = (distances + _PSEUDO_COUNT * distances.sum() / count) / (counts + _PSEUDO_COUNT)
        variance = (scatter + _PSEUDO_COUNT * scatter.sum() / count) / (counts + _PSEUDO_COUNT)
        self.mean = mean.to(self.mean.dtype)
        self.deviation = variance.clamp(min=1e-12).sqrt().to(self.deviation.dtype)

        height, width = self.offset.shape
        sums = torch.zeros(2, height, width, dtype=torch.float64, device=self.offset.device)
        for held, indices in self._patches:
            scores = self.at_centers(held, indices.long()).double()
            sums[0] += len(scores)
            sums[1] += F.adaptive_avg_pool2d(scores, (height, width)).sum(dim=0)
        images, scores = total(sums)
        self.offset = (scores / (images + _PSEUDO_COUNT)).to(self.offset.dtype)

    def forward(self, distances: Tensor, indices: Tensor) -> Tensor:
        """Score patches, in deviations above what is usual at their centre and place.

        Args:
            distances: Distance of each patch to its nearest centre, of shape (B, h, w). The offsets are resized where
                h x w is not the grid.
            indices: The index of that centre, of the same shape.

        Returns:
            Scores of the same shape.
        """
        offset, grid = self.offset, distances.shape[-2:]
        if offset.shape != grid:
            offset = F.interpolate(offset[None, None], size=grid, mode="bilinear", align_corners=False)[0, 0]
        return self.at_centers(distances, indices) - offset

    def at_centers(self, distances: Tensor, indices: Tensor) -> Tensor:
        """Score patches by what is usual at their centre alone; the arguments and the result are :meth:`forward`'s."""
        return (distances - self.mean[indices]) / self.deviation[indices]
