"""K-means: by FAISS, in two levels where the centres are many, or on the accelerator that has the points."""

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomalib_cfa.bank.distances import block_rows

_POINTS_IN_PART = 3072  # roughly; clustered together on the second level
_POINTS_PER_MIDDLE = 64  # sampled for the first level, which finds the parts
_FEWEST_FOR_TWO_LEVELS = 2048  # centres
_ITERATIONS = 6
_ITERATIONS_IN_PART = 3  # a fourth gains less than half a percent of inertia

Vectors = NDArray[np.float32]
Indices = NDArray[np.int64]


def k_means(points: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cluster points.

    On a CPU many centres are found in two levels: the points are parted into clusters of a few thousand, and each of
    these is clustered by itself, into a share of the centres in proportion to its points. That compares a point with
    some hundred centres instead of with all. An accelerator compares it with all.

    Args:
        points: Points of shape (P, D).
        clusters: How many centres, at most P.
        seed: Chooses the initial centres.

    Returns:
        Centres of shape (clusters, D), on the points' device, and for each the index of a point that is nearest to it,
        of shape (clusters,).
    """
    if points.device.type != "cpu":
        return _lloyd(points.detach().float(), clusters, seed)
    vectors = np.ascontiguousarray(points.detach().float().numpy())
    parts = len(vectors) // _POINTS_IN_PART
    if clusters < _FEWEST_FOR_TWO_LEVELS or parts < 2:
        centers = _centers(vectors, clusters, seed)
        nearest = _nearest_point(centers, vectors)
    else:
        centers, nearest = _cluster_in_parts(vectors, clusters, parts, seed)
    return torch.from_numpy(centers), torch.from_numpy(nearest)


def _lloyd(points: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations from random points, in tensor algebra that rounds the same each time."""
    start = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:clusters]
    centers = points[start.to(points.device)]
    for _ in range(_ITERATIONS):
        nearest = _nearest(points, centers)
        counts = nearest.bincount(minlength=clusters)
        means = torch.segment_reduce(points[nearest.argsort(stable=True)], "mean", lengths=counts)
        centers = means.where(counts[:, None] > 0, centers)  # of two equal centres, one has no nearest points
    return centers, _nearest(centers, points)


def _nearest(queries: Tensor, vectors: Tensor) -> Tensor:
    """The index of the vector nearest to each query."""
    half_norms = vectors.square().sum(dim=1) / 2
    blocks = queries.split(block_rows(queries, len(vectors)))
    return torch.cat([(half_norms - block @ vectors.T).argmin(dim=1) for block in blocks])


def _centers(
    vectors: Vectors, clusters: int, seed: int, iterations: int = _ITERATIONS, most_per_center: int | None = None
) -> Vectors:
    """Centres of FAISS's K-means, learned from a random sample where there are more vectors than that for each."""
    if clusters == len(vectors):
        return vectors.copy()
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        clusters,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=most_per_center or len(vectors),
    )
    kmeans.train(vectors)
    centers: Vectors = np.asarray(kmeans.centroids)
    return centers


def _nearest_point(queries: Vectors, vectors: Vectors) -> Indices:
    nearest: Indices = faiss.knn(queries, vectors, 1)[1][:, 0]
    return nearest


def _cluster_in_parts(vectors: Vectors, clusters: int, parts: int, seed: int) -> tuple[Vectors, Indices]:
    middles = _centers(vectors, parts, seed, most_per_center=_POINTS_PER_MIDDLE)
    part_of = _nearest_point(vectors, middles)
    order = np.argsort(part_of, kind="stable")
    groups = [group for group in np.split(order, np.cumsum(np.bincount(part_of, minlength=parts))[:-1]) if len(group)]
    shares = proportional_shares([len(group) for group in groups], clusters)
    groups_and_shares = [(group, share) for group, share in zip(groups, shares, strict=True) if share]

    def cluster(part: tuple[Indices, int]) -> tuple[Vectors, Indices]:
        group, share = part
        members = vectors[group]
        centers = _centers(members, share, seed, _ITERATIONS_IN_PART)
        return centers, group[_nearest_point(centers, members)]

    # A part for each thread: on a machine that is busy, threads that share a small part wait for each other for long.
    with ThreadPoolExecutor(faiss.omp_get_max_threads(), initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        centers, nearest = zip(*pool.map(cluster, groups_and_shares), strict=True)
    return np.concatenate(centers), np.concatenate(nearest)


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
