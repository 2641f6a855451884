"""Memory bank: the centres of the hyperspheres, a number that does not grow with the data set."""

from typing import Any

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor

from anomalib_cfa.bank.search import CenterIndex


class MemoryBank(DynamicBufferMixin):
    """Holds the centres, and finds and measures those nearest to a patch (paper, section III-B).

    Its state is the centres, of shape (N, D), and where each came from, of shape (N, 3): the training image's place in
    the data set, and the row and column of the patch that is nearest to the centre. Both are empty until
    :meth:`assign`; a bank of means, or of moving means, has no sources.

    Args:
        search: Kind of search, one of :data:`anomalib_cfa.bank.SEARCH_KINDS`.

    Example:
        >>> bank = MemoryBank()
        >>> bank.assign(torch.rand(100, 32))
        >>> squared, indices = bank.nearest(torch.rand(2, 8, 8, 32), k=6)
        >>> squared.shape, indices.shape
        (torch.Size([2, 8, 8, 6]), torch.Size([2, 8, 8, 6]))
    """

    centers: Tensor
    sources: Tensor

    def __init__(self, search: str = "two_level") -> None:
        super().__init__()
        self.search = search
        self.register_buffer("centers", torch.empty(0, 0))
        self.register_buffer("sources", torch.empty(0, 3, dtype=torch.int32))
        self._index: CenterIndex | None = None
        self._indexed: tuple[int, int | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        modules = {name: module for name, module in self._modules.items() if name != "_index"}
        return {**self.__dict__, "_modules": modules, "_index": None, "_indexed": None}

    @property
    def is_built(self) -> bool:
        """Whether there are centres."""
        return self.centers.numel() > 0

    @property
    def index(self) -> CenterIndex:
        """The search over the centres as they are now; built when it is first needed."""
        if self._index is not None and torch.compiler.is_exporting():
            return self._index  # the tensors that are traced are stand-ins
        # An inference tensor has no version, as it cannot be changed in place outside of inference mode.
        version = None if self.centers.is_inference() else self.centers._version  # noqa: SLF001 - has no other name
        state = (self.centers.data_ptr(), version)
        index = self._index
        if index is None or self._indexed != state:
            # Built first and assigned at the end: several threads may arrive here at once.
            with torch.inference_mode(False), torch.autocast(self.centers.device.type, enabled=False):
                index = CenterIndex(self.centers.clone() if self.centers.is_inference() else self.centers, self.search)
            self._index, self._indexed = index, state
        return index

    def assign(self, centers: Tensor, sources: Tensor | None = None) -> None:
        """Set the centres, of shape (N, D), and where each came from, of shape (N, 3), if that is known.

        Raises:
            ValueError: If a centre is not finite.
        """
        if not torch.isfinite(centers).all():
            msg = "The memory bank holds nan or infinite centres: the backbone's features are not finite"
            raise ValueError(msg)
        self.centers = centers.detach().contiguous()
        self.sources = self.sources.new_empty(0, 3) if sources is None else sources.to(self.sources)

    def clear(self) -> None:
        """Forget the centres."""
        self.assign(self.centers.new_empty(0, 0))

    def nearest(self, descriptors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find and measure the k nearest centres of patch descriptors of shape (B, h, w, D).

        Returns:
            Squared distances in float32, nearest first, differentiable in the descriptors, and the centres' indices,
            both of shape (B, h, w, k).
        """
        squared, indices = self.index(descriptors, k)
        return squared, indices

    def nearest_elsewhere(self, squared: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Of each patch's nearest centres, given as by :meth:`nearest`, the first that came from another place.

        Returns:
            Squared distance and index of that centre, both of shape (B, h, w): of the last centre where none came from
            elsewhere, of the first where the sources are not known.
        """
        if not len(self.sources):
            return squared[..., 0], indices[..., 0]
        rows, columns = (torch.arange(size, device=indices.device) for size in indices.shape[1:3])
        _, row, column = self.sources.T
        elsewhere = (row[indices] != rows[:, None, None]) | (column[indices] != columns[:, None])
        elsewhere[..., -1] = True
        first = elsewhere.byte().argmax(dim=-1, keepdim=True)
        return squared.gather(-1, first)[..., 0], indices.gather(-1, first)[..., 0]

    def _apply(self, *args: Any, **kwargs: Any) -> "MemoryBank":
        # To another device or precision: the index is rebuilt there, always in float32.
        self._index = self._indexed = None
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(f"{prefix}sources", self.sources.new_empty(0, 3))  # 0.1.0 has none
        self.clear()  # what was built may lie in storage that cannot be resized
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
