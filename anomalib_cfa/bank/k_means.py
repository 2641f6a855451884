"""K-means: Lloyd's iterations, on a CPU in two levels where the centres are many."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_cfa.bank.distances import block_rows

_POINTS_IN_PART = 3072  # roughly; clustered together on the second level
_POINTS_PER_MIDDLE = 64  # sampled for the first level, which finds the parts
_FEWEST_FOR_TWO_LEVELS = 2048  # centres
_ITERATIONS = 6
_ITERATIONS_IN_PART = 3  # a fourth gains less than half a percent of inertia


def k_means(points: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cluster points of shape (P, D) into so many clusters, at most P.

    On a CPU many centres are found in two levels: the points are parted into clusters of a few thousand, and each of
    these is clustered by itself, into a share of the centres in proportion to its points. That compares a point with
    some hundred centres instead of with all. An accelerator compares it with all.

    Returns:
        Centres of shape (clusters, D), on the points' device, and for each the index of that of its points which is
        nearest to it, of shape (clusters,).
    """
    points = points.detach().float()
    parts = len(points) // _POINTS_IN_PART
    if points.device.type == "cpu" and clusters >= _FEWEST_FOR_TWO_LEVELS and parts >= 2:
        return _cluster_in_parts(points, clusters, parts, seed)
    return _lloyd(points, clusters, seed, _ITERATIONS)


def _cluster_in_parts(points: Tensor, clusters: int, parts: int, seed: int) -> tuple[Tensor, Tensor]:
    sample = points[_random(len(points), parts * _POINTS_PER_MIDDLE, seed)]
    part_of = _nearest(points, _lloyd(sample, parts, seed, _ITERATIONS)[0])
    sizes = part_of.bincount(minlength=parts).tolist()
    centers, nearest = [], []
    groups = part_of.argsort(stable=True).split(sizes)
    for group, share in zip(groups, proportional_shares(sizes, clusters), strict=True):
        if share:
            found, members = _lloyd(points[group], share, seed, _ITERATIONS_IN_PART)
            centers.append(found)
            nearest.append(group[members])
    return torch.cat(centers), torch.cat(nearest)


def _lloyd(points: Tensor, clusters: int, seed: int, iterations: int) -> tuple[Tensor, Tensor]:
    """:func:`k_means` by Lloyd's iterations from random points, in tensor algebra that rounds the same each time."""
    chosen = _random(len(points), clusters, seed).to(points.device)
    centers = points[chosen]
    if clusters == len(points):
        return centers, chosen
    for _ in range(iterations):
        cluster = _nearest(points, centers)
        counts = cluster.bincount(minlength=clusters)
        # A sum of rows by their index: reducing segments of sorted copies takes seven times as long.
        sums = F.embedding_bag(cluster.argsort(stable=True), points, counts.cumsum(dim=0) - counts, mode="sum")
        centers = (sums / counts[:, None]).where(counts[:, None] > 0, centers)  # of two equal centres, one has none
    # Cluster by cluster, and in each the nearest point first: another product would cost as much as an iteration.
    order = (points - centers[cluster]).square().sum(dim=1).argsort(stable=True)
    order = order[cluster[order].argsort(stable=True)]
    first = (counts.cumsum(dim=0) - counts).clamp(max=len(points) - 1)
    is_empty = counts == 0
    nearest = order[first]
    nearest[is_empty] = _nearest(centers[is_empty], points)
    return centers, nearest


def _random(count: int, chosen: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:chosen]


def _nearest(queries: Tensor, vectors: Tensor) -> Tensor:
    """The index of the vector nearest to each query."""
    half_norms = vectors.square().sum(dim=1) / 2
    blocks = queries.split(block_rows(queries, len(vectors)))
    return torch.cat([torch.addmm(half_norms, block, vectors.T, alpha=-1).argmin(dim=1) for block in blocks])


def proportional_shares(sizes: list[int], total: int) -> list[int]:
    """Part ``total`` in proportion to sizes, by largest remainders; no share is larger than its size.

    Example:
        >>> proportional_shares([10, 1, 5], total=8)
        [5, 1, 2]
    """
    exact = np.asarray(sizes) * total / sum(sizes)
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    return [int(share) for share in shares]
