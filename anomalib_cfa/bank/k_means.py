"""K-means: Lloyd's iterations, on a CPU in two levels where the centres are many."""

import numpy as np
import torch
from torch import Tensor

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
        Centres of shape (clusters, D), on the points' device, and for each the index of a point that is nearest to it,
        of shape (clusters,).
    """
    points = points.detach().float()
    parts = len(points) // _POINTS_IN_PART
    if points.device.type == "cpu" and clusters >= _FEWEST_FOR_TWO_LEVELS and parts >= 2:
        return _cluster_in_parts(points, clusters, parts, seed)
    centers = _centers(points, clusters, seed, _ITERATIONS)
    return centers, _nearest(centers, points)


def _cluster_in_parts(points: Tensor, clusters: int, parts: int, seed: int) -> tuple[Tensor, Tensor]:
    sample = points[_random(len(points), parts * _POINTS_PER_MIDDLE, seed)]
    part_of = _nearest(points, _centers(sample, parts, seed, _ITERATIONS))
    sizes = part_of.bincount(minlength=parts).tolist()
    centers, nearest = [], []
    groups = part_of.argsort(stable=True).split(sizes)
    for group, share in zip(groups, proportional_shares(sizes, clusters), strict=True):
        if share:
            members = points[group]
            centers.append(_centers(members, share, seed, _ITERATIONS_IN_PART))
            nearest.append(group[_nearest(centers[-1], members)])
    return torch.cat(centers), torch.cat(nearest)


def _centers(points: Tensor, clusters: int, seed: int, iterations: int) -> Tensor:
    """Lloyd's iterations from random points, in tensor algebra that rounds the same each time."""
    centers = points[_random(len(points), clusters, seed).to(points.device)]
    for _ in range(iterations if clusters < len(points) else 0):
        nearest = _nearest(points, centers)
        counts = nearest.bincount(minlength=clusters)
        means = torch.segment_reduce(points[nearest.argsort(stable=True)], "mean", lengths=counts)
        centers = means.where(counts[:, None] > 0, centers)  # of two equal centres, one has no nearest points
    return centers


def _random(count: int, chosen: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:chosen]


def _nearest(queries: Tensor, vectors: Tensor) -> Tensor:
    """The index of the vector nearest to each query."""
    half_norms = vectors.square().sum(dim=1) / 2
    blocks = queries.split(block_rows(queries, len(vectors)))
    return torch.cat([(half_norms - block @ vectors.T).argmin(dim=1) for block in blocks])


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
