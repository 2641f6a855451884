"""Calibration of the score: what distance is usual around each centre of the memory bank."""

from collections.abc import Callable
from typing import Any

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

_PSEUDO_COUNT = 30  # patches: the weight of the mean and variance of all centres


class CenterCalibration(DynamicBufferMixin):
    """Relates a patch's distance to what is usual for normal patches around the same centre.

    Normal patches do not lie equally near to their centres: where normal images vary, they stay further out. A single
    scale for all centres scores such places high on every image. Here a score counts the deviations above the mean of
    the training patches that are nearest to the centre or to one of its neighbours. Where there are few of them, mean
    and deviation are drawn towards those of all.

    Its life: :meth:`reset` with a new memory bank, :meth:`restart` as an epoch begins, :meth:`update` with each block
    of images, :meth:`finish` before each validation and at the epoch's end. What that finds counts until the next.

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
        """Forget everything: the distances to this many centres count as they are until :meth:`finish`."""
        self.mean = self.mean.new_zeros(centers)
        self.deviation = self.deviation.new_ones(centers)
        self.restart()

    def restart(self) -> None:
        """Begin to take in distances anew, and keep what is known until then."""
        self._sums = torch.zeros(3, len(self.mean), dtype=torch.float64, device=self.mean.device)

    @torch.no_grad()
    def update(self, distances: Tensor, indices: Tensor) -> None:
        """Take in normal patches: their distances to the nearest centre and its indices, both of one shape."""
        if self._sums is None:
            self.restart()
        assert self._sums is not None
        values, indices = distances.detach().flatten().double(), indices.flatten()
        for sums, value in zip(self._sums, (torch.ones_like(values), values, values.square()), strict=True):
            sums.index_add_(0, indices, value)

    def finish(
        self, neighbors: Tensor | None = None, total: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> None:
        """Compute mean and deviation from all that was taken in since :meth:`restart`; nothing changes if none was.

        Args:
            neighbors: For each centre those whose patches count for it, itself among them, of shape (N, k). None: each
                centre by itself.
            total: Sums a tensor over all processes.
        """
        if self._sums is None:
            return
        sums = total(self._sums.clone())
        count, distance, _ = sums.sum(dim=1)
        if count == 0:
            return
        if neighbors is not None:
            sums = sums[:, neighbors].sum(dim=2)
        counts, distances, _ = sums
        of_all = _scatter(sums).sum() / counts.sum()  # within neighbourhoods, without the variance between them
        mean = (distances + _PSEUDO_COUNT * distance / count) / (counts + _PSEUDO_COUNT)
        variance = (_scatter(sums) + _PSEUDO_COUNT * of_all) / (counts + _PSEUDO_COUNT)
        self.mean = mean.to(self.mean.dtype)
        self.deviation = variance.clamp(min=1e-12).sqrt().to(self.deviation.dtype)

    def forward(self, distances: Tensor, indices: Tensor) -> Tensor:
        """Score patches, given as for :meth:`update`, in deviations above what is usual around their centre."""
        # A product and a sum of looked-up values, flattened and not indexed: see anomalib_cfa.export.openvino.
        scale = 1 / self.deviation[:, None]
        shift = -self.mean[:, None] * scale
        of_scale, of_shift = (F.embedding(indices, table).flatten(-2) for table in (scale, shift))
        scores: Tensor = distances * of_scale + of_shift
        return scores


def _scatter(sums: Tensor) -> Tensor:
    """Sum of squared deviations from the mean, of counts, sums and sums of squares of shape (3, ...)."""
    counts, distances, squares = sums
    scatter: Tensor = (squares - distances.square() / counts.clamp(min=1)).clamp(min=0)
    return scatter
