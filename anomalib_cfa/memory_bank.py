"""Memory bank: the centres of the hyperspheres, a number that does not grow with the data set."""

import logging
from typing import Any

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor

from anomalib_cfa.search import NeighborSearch, nearest_centers, squared_distances

logger = logging.getLogger(__name__)

_VARIANCE_KEPT = 0.99  # of the bank, by the principal axes in which candidates are searched
_AXES_MULTIPLE = 16


class MemoryBank(DynamicBufferMixin):
    """Holds the centres, and finds and measures those nearest to a patch (paper, section III-B).

    Its state is plain tensors: the centres, of shape (N, D), and their principal axes, of shape (D, R), in which
    candidates are searched. Both are empty until :meth:`assign`.

    Args:
        search: Kind of search for the targets of attraction and repulsion in training, see :class:`NeighborSearch`.

    Example:
        >>> bank = MemoryBank()
        >>> bank.assign(torch.rand(100, 32))
        >>> squared, indices = bank.nearest(torch.rand(2, 8, 8, 32), k=6)
        >>> squared.shape, indices.shape
        (torch.Size([2, 8, 8, 6]), torch.Size([2, 8, 8, 6]))
    """

    centers: Tensor
    axes: Tensor

    def __init__(self, search: str = "pca") -> None:
        super().__init__()
        self.search = NeighborSearch(search)
        self.register_buffer("centers", torch.empty(0, 0))
        self.register_buffer("axes", torch.empty(0, 0))

    @property
    def is_built(self) -> bool:
        """Whether there are centres."""
        return self.centers.numel() > 0

    def assign(self, centers: Tensor) -> None:
        """Set the centres.

        Args:
            centers: Centres of shape (N, D).

        Raises:
            ValueError: If a centre is not finite.
        """
        if not torch.isfinite(centers).all():
            msg = "The memory bank holds nan or infinite centres: the backbone's features are not finite"
            raise ValueError(msg)
        self.centers = centers.detach().contiguous()
        self.axes = _principal_axes(self.centers)
        self.search.reset()

    def clear(self) -> None:
        """Forget the centres."""
        self.centers = self.centers.new_empty(0, 0)
        self.axes = self.axes.new_empty(0, 0)
        self.search.reset()

    def nearest(self, descriptors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find and measure the k nearest centres; the distances are differentiable in the descriptors.

        Args:
            descriptors: Patch descriptors of shape (..., D).
            k: How many centres, at most N.

        Returns:
            Squared distances in float32, nearest first, and the centres' indices, both of shape (..., k).
        """
        shape = *descriptors.shape[:-1], k
        queries = descriptors.flatten(0, -2)
        if torch.compiler.is_compiling():  # an exported graph searches with torch alone
            squared, indices = nearest_centers(queries, self.centers, self.axes, k)
            return squared.reshape(shape), indices.reshape(shape)
        with torch.autocast(descriptors.device.type, enabled=False):
            if torch.is_grad_enabled() and descriptors.requires_grad:
                indices = self.search(queries, self.centers, self.axes, k)
                squared = squared_distances(queries, self.centers, indices)
            else:
                squared, indices = nearest_centers(queries.float(), self.centers.float(), self.axes.float(), k)
            return squared.reshape(shape), indices.reshape(shape)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super()._load_from_state_dict(*args, **kwargs)
        self.search.reset()


def _principal_axes(centers: Tensor) -> Tensor:
    """Leading principal axes of the centres, of shape (D, R): the fewest that keep nearly all of their variance."""
    deviations = (centers - centers.mean(dim=0)).double()
    variances, axes = torch.linalg.eigh(deviations.T @ deviations)
    kept = variances.clamp(min=0).flip(0).cumsum(0) / variances.clamp(min=0).sum().clamp(min=1e-30)
    needed = int((kept < _VARIANCE_KEPT).sum()) + 1
    count = min(-(-needed // _AXES_MULTIPLE) * _AXES_MULTIPLE, centers.shape[1])
    leading: Tensor = axes.flip(1)[:, :count].to(centers.dtype).contiguous()
    return leading
