"""K-means: by FAISS, in two levels where the centres are many, or on the accelerator that has the points."""

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomalib_cfa.bank.distances import block_rows

_POINTS_IN_CLUSTER = 1024  # about so many points are clustered at once on the second level
_FEWEST_FOR_TWO_LEVELS = 2048  # centres
_ITERATIONS = 6

Vectors = NDArray[np.float32]
Indices = NDArray[np.int64]


def k_means(points: Tensor, clusters: int, seed: int, iterations: int = _ITERATIONS) -> tuple[Tensor, Tensor]:
    """Cluster points.

    On a CPU many centres are found in two levels: the points are parted into clusters of about a thousand, and each of
    these is clustered by itself, into a share of the centres in proportion to its points. That compares a point with
    some hundred centres instead of with all. An accelerator compares it with all.

    Args:
        points: Points of shape (P, D).
        clusters: How many centres, at most P.
        seed: Chooses the initial centres.
        iterations: Of each level.

    Returns:
        Centres of shape (clusters, D), on the points' device, and for each the index of a point that is nearest to it,
        of shape (clusters,).
    """
    if points.device.type != "cpu":
        return _lloyd(points.detach().float(), clusters, seed, iterations)
    vectors = np.ascontiguousarray(points.detach().float().numpy())
    parts = len(vectors) // _POINTS_IN_CLUSTER
    if clusters < _FEWEST_FOR_TWO_LEVELS or parts < 2:
        centers, nearest = _cluster(vectors, clusters, seed, iterations)
    else:
        centers, nearest = _cluster_in_parts(vectors, clusters, parts, seed, iterations)
    return torch.from_numpy(centers), torch.from_numpy(nearest)


def _lloyd(points: Tensor, clusters: int, seed: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations from random points, in tensor algebra that rounds the same each time."""
    start = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:clusters]
    centers = points[start.to(points.device)]
    for _ in range(iterations):
        nearest = _nearest(points, centers)
        counts = nearest.bincount(minlength=clusters)
        means = torch.segment_reduce(points[nearest.argsort(stable=True)], "mean", lengths=counts)
        centers = means.where(counts[:, None] > 0, centers)  # of equal points one has none nearest to it
    return centers, _nearest(centers, points)


def _nearest(queries: Tensor, vectors: Tensor) -> Tensor:
    """The index of the vector nearest to each query."""
    half_norms = vectors.square().sum(dim=1) / 2
    blocks = queries.split(block_rows(queries, len(vectors)))
    return torch.cat([(half_norms - block @ vectors.T).argmin(dim=1) for block in blocks])


def _cluster(vectors: Vectors, clusters: int, seed: int, iterations: int) -> tuple[Vectors, Indices]:
    if clusters == len(vectors):
        return vectors.copy(), np.arange(clusters)
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        clusters,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(vectors),
    )
    kmeans.train(vectors)
    centers: Vectors = np.asarray(kmeans.centroids)
    nearest: Indices = faiss.knn(centers, vectors, 1)[1][:, 0]
    return centers, nearest


def _cluster_in_parts(
    vectors: Vectors, clusters: int, parts: int, seed: int, iterations: int
) -> tuple[Vectors, Indices]:
    middles, _ = _cluster(vectors, parts, seed, iterations)
    part = faiss.knn(vectors, middles, 1)[1][:, 0]
    order = np.argsort(part, kind="stable")
    groups = [group for group in np.split(order, np.cumsum(np.bincount(part, minlength=parts))[:-1]) if len(group)]
    shares = proportional_shares([len(group) for group in groups], clusters)

    parts_and_shares = [(group, share) for group, share in zip(groups, shares, strict=True) if share]

    def cluster(part: tuple[Indices, int]) -> tuple[Vectors, Indices]:
        group, share = part
        centers, nearest = _cluster(vectors[group], share, seed, iterations)
        return centers, group[nearest]

    # A part for each thread: on a machine that is busy, threads that share a small part wait for each other for long.
    with ThreadPoolExecutor(faiss.omp_get_max_threads(), initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        centers, nearest = zip(*pool.map(cluster, parts_and_shares), strict=True)
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
