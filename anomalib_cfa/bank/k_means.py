"""K-means by FAISS, in two levels where the centres are many."""

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_POINTS_IN_CLUSTER = 1024  # about so many points are clustered at once on the second level
_FEWEST_FOR_TWO_LEVELS = 2048  # centres
_ITERATIONS = 6

Vectors = NDArray[np.float32]
Indices = NDArray[np.int64]


def k_means(points: Tensor, clusters: int, seed: int, iterations: int = _ITERATIONS) -> tuple[Tensor, Tensor]:
    """Cluster points.

    Many centres are found in two levels: the points are parted into clusters of about a thousand, and each of these is
    clustered by itself, into a share of the centres in proportion to its points. That compares a point with some
    hundred centres instead of with all.

    Args:
        points: Points of shape (P, D).
        clusters: How many centres, at most P.
        seed: Chooses the initial centres.
        iterations: Of each level.

    Returns:
        Centres of shape (clusters, D), on the points' device, and for each the index of a point that is nearest to it,
        of shape (clusters,).
    """
    vectors = np.ascontiguousarray(points.detach().float().cpu().numpy())
    parts = len(vectors) // _POINTS_IN_CLUSTER
    if clusters < _FEWEST_FOR_TWO_LEVELS or parts < 2:
        centers, nearest = _cluster(vectors, clusters, seed, iterations)
    else:
        centers, nearest = _cluster_in_parts(vectors, clusters, parts, seed, iterations)
    return torch.from_numpy(centers).to(points.device), torch.from_numpy(nearest).to(points.device)


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
    centers, nearest = [], []
    for group, share in zip(groups, proportional_shares([len(group) for group in groups], clusters), strict=True):
        if share:
            found, of_group = _cluster(vectors[group], share, seed, iterations)
            centers.append(found)
            nearest.append(group[of_group])
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
