"""The memory bank in the space of the patch features, where evaluation searches it."""

import math
from collections.abc import Sequence
from typing import Any

import faiss
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_cfa.bank.projection import turned
from anomalib_cfa.bank.search import squared_distances
from anomalib_cfa.descriptor import PatchDescriptor, patch_coordinates

_SPARE_CANDIDATES = 2  # beyond k, for centres that the ranking's rounding cannot tell apart
_COLUMNS = 256  # centres, or channels of the descriptor, that are computed at a time: what a CPU's caches hold
_COLUMNS_ON_ACCELERATOR = 512


class FoldedBank:
    """Finds each patch's nearest centres among all, while neither descriptor nor bank changes.

    With the patch descriptor ``q = sum_l up(W_l f_l) + ...`` the product ``c.q`` is ``sum_l up((c.W_l) f_l) + ...``: so
    the centres are ranked at each level's own resolution, without a descriptor. The distance to those that lead is a
    sum of squared differences, which does not cancel. For it the descriptor's channels are turned so that most of them
    read the coarse levels alone; an orthogonal turn leaves distances as they are.

    Everything is computed a block of columns at a time, and each block in the same memory: neither a matrix of all
    patches and centres nor a descriptor is ever stored.

    Args:
        descriptor: The patch descriptor.
        centers: The memory bank's centres of shape (N, D).

    Example:
        >>> descriptor = PatchDescriptor(channels=(4, 8), width=12)
        >>> pyramid = [torch.rand(1, 4, 8, 8), torch.rand(1, 8, 4, 4)]
        >>> centers = descriptor(pyramid).detach().flatten(0, 2)
        >>> squared, indices = FoldedBank(descriptor, centers).nearest(pyramid, k=1)
        >>> torch.equal(indices.flatten(), torch.arange(64))
        True
    """

    @torch.no_grad()
    def __init__(self, descriptor: PatchDescriptor, centers: Tensor) -> None:
        self._state = _State(descriptor, centers)
        self._count = len(centers)
        with torch.autocast(centers.device.type, enabled=False):
            self._rankings, self._descriptors = _fold(descriptor, centers.float())

    def is_of(self, descriptor: PatchDescriptor, centers: Tensor) -> bool:
        """Whether it is what these give, as they are now."""
        return self._state.keys == _State(descriptor, centers).keys

    @torch.no_grad()
    def nearest(self, pyramid: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
        """Find and measure the k centres nearest to each patch, in float32 whatever the autocast.

        Args:
            pyramid: Pooled feature maps of shape (B, C_l, h_l, w_l), finest first.
            k: How many centres, at most N.

        Returns:
            Squared distances, nearest first, and the centres' indices, both of shape (B, h, w, k).
        """
        batch, _, height, width = pyramid[0].shape
        device = pyramid[0].device
        with torch.autocast(device.type, enabled=False):
            project = _Projection([level.float() for level in pyramid])
            leading = SmallestSoFar(batch * height * width, min(k + _SPARE_CANDIDATES, self._count), device)
            for weights in self._rankings:
                leading.add(project(weights))
            candidates = leading.columns()
            squared = torch.zeros(candidates.shape, device=device)
            for weights, centers in self._descriptors:
                squared += squared_distances(project(weights), centers, candidates)
        squared, order = squared.topk(k, dim=1, largest=False)
        shape = batch, height, width, k
        return squared.view(shape), candidates.gather(1, order).view(shape)


class _State:
    """What a folded bank was made of: tensors, and by what it is seen that they have changed."""

    def __init__(self, descriptor: PatchDescriptor, centers: Tensor) -> None:
        # Held, so that no other tensor can come to lie where these do.
        parts = descriptor.weight, descriptor.bias, descriptor.feature_mean, descriptor.feature_scale, centers
        self.tensors = [tensor.detach() for tensor in parts]
        self.keys = [
            (tensor.data_ptr(), None if tensor.is_inference() else tensor._version)  # noqa: SLF001 - has no other name
            for tensor in self.tensors
        ]


def _fold(descriptor: PatchDescriptor, centers: Tensor) -> tuple[list[list[Tensor]], list[tuple[list[Tensor], Tensor]]]:
    """Prepare both passes.

    Returns:
        For each block of centres the level weights of ``|c|^2 / 2 - c.q``; for each block of the turned descriptor's
        channels its level weights, and the centres' part in these. Weights are as :class:`_Projection` takes them.
    """
    columns = _COLUMNS if centers.device.type == "cpu" else _COLUMNS_ON_ACCELERATOR
    # The descriptors are centred on the bank: the smaller they are, the less rounding the ranking sees.
    origin = centers.mean(dim=0)
    centers = centers - origin
    (finest, *coarser), coordinate_weight, offset = descriptor.affine(torch.float32)
    level_weights = [torch.cat([finest, coordinate_weight, (offset - origin)[:, None]], dim=1), *coarser]

    rankings = []
    for chosen in centers.split(columns):
        finest, *coarser = (-chosen @ weight for weight in level_weights)
        finest[:, -1] += chosen.square().sum(dim=1) / 2
        rankings.append([finest, *coarser])

    turn, level_weights = turned(level_weights)
    descriptors = [
        ([weight[start : start + columns] for weight in level_weights], centers @ turn[start : start + columns].T)
        for start in range(0, len(turn), columns)
    ]
    return rankings, descriptors


class _Projection:
    """Linear maps of a pyramid to the patches of its finest level, each in the memory of the one before.

    New memory of this size costs more than what is computed in it.

    Args:
        pyramid: Feature maps of shape (B, C_l, h_l, w_l), finest first.
    """

    def __init__(self, pyramid: Sequence[Tensor]) -> None:
        finest, *coarser = pyramid
        self._batch, _, self._height, self._width = finest.shape
        coordinates = patch_coordinates(self._height, self._width, finest)
        channels = torch.cat([coordinates, torch.ones_like(coordinates[..., :1])], dim=-1).permute(2, 0, 1)
        finest = torch.cat([finest, channels.expand(self._batch, -1, -1, -1)], dim=1)
        self._levels = [level.permute(0, 2, 3, 1) for level in (finest, *coarser)]
        self._result, self._addend = finest.new_empty(2, 0)

    def __call__(self, weights: Sequence[Tensor]) -> Tensor:
        """Project every patch.

        Args:
            weights: Of each level, of shape (n_l, C_l): its part in the first n_l columns. That of the finest has three
                more, for y, x and 1; that of the coarsest has all columns.

        Returns:
            Projections of shape (B * h * w, columns), to be used before the next call.
        """
        columns = len(weights[-1])
        size = self._batch * self._height * self._width * columns
        if self._result.numel() < size:
            self._result, self._addend = self._result.new_empty(size), self._result.new_empty(size)
        *finer, coarsest = zip(self._levels, weights, strict=True)
        result = self._project(*coarsest, self._result)
        for level, weight in finer:
            if len(weight) == 0:
                continue
            part = result[:, : len(weight)]
            if self._is_fine(level):
                part.addmm_(level.flatten(0, 2), weight.T)
            else:
                part.add_(self._project(level, weight, self._addend))
        return result

    def _is_fine(self, level: Tensor) -> bool:
        return level.shape[1:3] == (self._height, self._width)

    def _project(self, level: Tensor, weight: Tensor, memory: Tensor) -> Tensor:
        """One level, resized, of shape (B * h * w, n)."""
        shape = self._batch, self._height, self._width, len(weight)
        out = memory[: math.prod(shape)].view(shape)
        if self._is_fine(level):
            return torch.mm(level.flatten(0, 2), weight.T, out=out.flatten(0, 2))
        projected = F.linear(level, weight).permute(0, 3, 1, 2)
        # That of `interpolate`, which takes no `out`.
        resize = torch.ops.aten.upsample_bilinear2d.out
        resize(projected, shape[1:3], False, None, None, out=out.permute(0, 3, 1, 2))
        return out.flatten(0, 2)


class SmallestSoFar:
    """The k smallest values of each row of a matrix whose columns come block by block.

    Args:
        rows: Of the matrix.
        k: How many to keep, at most as many as there will be columns.
        device: Where the matrix lies. On a CPU they are kept in FAISS's heaps, which for few of them take a fraction of
            the time of PyTorch's ``topk``.

    Example:
        >>> smallest = SmallestSoFar(rows=1, k=2, device=torch.device("cpu"))
        >>> smallest.add(torch.tensor([[3.0, 1.0]]))
        >>> smallest.add(torch.tensor([[2.0, 4.0]]))
        >>> smallest.columns().sort().values
        tensor([[1, 2]])
    """

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self._values = torch.full((rows, k), torch.inf, device=device)
        self._columns = torch.zeros(rows, k, dtype=torch.int64, device=device)
        self._seen = 0
        self._heaps: Any = None
        if device.type == "cpu":
            self._heaps = faiss.float_maxheap_array_t()
            self._heaps.nh, self._heaps.k = rows, k
            self._heaps.val = faiss.swig_ptr(self._values.numpy())
            self._heaps.ids = faiss.swig_ptr(self._columns.numpy())
            self._heaps.heapify()

    def add(self, values: Tensor) -> None:
        """Take in the next columns.

        Args:
            values: In float32, contiguous, of shape (rows, columns).
        """
        count = values.shape[1]
        if self._heaps is not None:
            self._heaps.addn(count, faiss.swig_ptr(values.numpy()), self._seen)
        else:
            columns = torch.arange(self._seen, self._seen + count, device=values.device).expand_as(values)
            joined = torch.cat([self._values, values], dim=1)
            self._values, order = joined.topk(self._values.shape[1], dim=1, largest=False)
            self._columns = torch.cat([self._columns, columns], dim=1).gather(1, order)
        self._seen += count

    def columns(self) -> Tensor:
        """Where they stand, in no order, of shape (rows, k). In a row of nan they may be any."""
        return self._columns.clamp(min=0)
