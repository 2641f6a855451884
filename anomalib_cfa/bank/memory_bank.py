"""Memory bank: the centres of the hyperspheres, a number that does not grow with the data set."""

import logging
from typing import Any

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor

from anomalib_cfa.bank.search import NeighborSearch, nearest_centers, squared_distances

logger = logging.getLogger(__name__)


class MemoryBank(DynamicBufferMixin):
    """Holds the centres, and finds and measures those nearest to a patch (paper, section III-B).

    Its state is one plain tensor, the centres, of shape (N, D); empty until :meth:`assign`.

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

    def __init__(self, search: str = "ivf") -> None:
        super().__init__()
        self.search = NeighborSearch(search)
        self.register_buffer("centers", torch.empty(0, 0))

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
        self.search.reset()

    def clear(self) -> None:
        """Forget the centres."""
        self.centers = self.centers.new_empty(0, 0)
        self.search.reset()

    def nearest(self, descriptors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find and measure the k nearest centres.

        In training mode the search is that of the index, and the distances are differentiable in the descriptors. In
        evaluation mode the search is exact.

        Args:
            descriptors: Patch descriptors of shape (..., D).
            k: How many centres, at most N.

        Returns:
            Squared distances in float32, nearest first, and the centres' indices, both of shape (..., k).
        """
        shape = *descriptors.shape[:-1], k
        queries = descriptors.flatten(0, -2)
        with torch.autocast(descriptors.device.type, enabled=False):
            if self.training:
                indices = self.search(queries, self.centers, k)
                squared = squared_distances(queries, self.centers, indices)
            else:
                squared, indices = nearest_centers(queries.float(), self.centers.float(), k)
            return squared.reshape(shape), indices.reshape(shape)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super()._load_from_state_dict(*args, **kwargs)
        self.search.reset()
