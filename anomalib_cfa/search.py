"""Nearest-neighbour search over the memory bank: which centres attract a patch, and which repel it."""

from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

SEARCH_KINDS = ("exact", "pca", "ivf", "hnsw")

_CANDIDATES_PER_NEIGHBOR = 2
_BLOCK_BYTES = 64 * 2**20  # of a distance matrix held at a time


class NeighborSearch:
    """Finds the centres of the memory bank nearest to each patch descriptor.

    The approximate kinds share one scheme: candidates are found among copies of the centres projected on the bank's
    principal axes, a fraction of the descriptor's width, and then ranked by their exact distances. They differ in how
    the projected copies are searched: all of them (``"pca"``), an inverted file (``"ivf"``) or a graph (``"hnsw"``).

    The index is derived from the bank and rebuilt when needed: it is never pickled, copied or read from a file.

    Args:
        kind: One of ``SEARCH_KINDS``. On an accelerator, for which FAISS's packages have no build, the search is
            torch's: ``"exact"`` for itself, ``"pca"`` in place of every approximate kind.

    Raises:
        ValueError: If ``kind`` is none of these.
    """

    def __init__(self, kind: str = "pca") -> None:
        if kind not in SEARCH_KINDS:
            msg = f"search must be one of {', '.join(map(repr, SEARCH_KINDS))}, but is {kind!r}"
            raise ValueError(msg)
        self.kind = kind
        self._index: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"kind": self.kind, "_index": None}

    def reset(self) -> None:
        """Forget the index: the bank has changed."""
        self._index = None

    @torch.no_grad()
    def __call__(self, queries: Tensor, centers: Tensor, axes: Tensor, k: int) -> Tensor:
        """Find each query's k nearest centres.

        Args:
            queries: Patch descriptors of shape (Q, D).
            centers: The memory bank's centres of shape (N, D).
            axes: The bank's principal axes of shape (D, R).
            k: How many to find, at most N.

        Returns:
            Indices of the centres, nearest first, of shape (Q, k).
        """
        queries, centers = queries.detach().float(), centers.float()
        exact = self.kind == "exact"
        if queries.device.type != "cpu":
            return nearest_centers(queries, centers, None if exact else axes, k)[1]
        # Far from the origin the search's own distances cancel.
        origin = centers.mean(dim=0)
        shifted, vectors = queries - origin, centers - origin
        if not exact:
            shifted, vectors = shifted @ axes, vectors @ axes
        count = min(_CANDIDATES_PER_NEIGHBOR * k, len(centers))
        candidates = self._search(shifted, vectors, count)
        # An inverted file returns -1 where the lists that it visited held too few: such a query is answered in full.
        short = (candidates < 0).any(dim=1)
        if short.any():
            candidates[short] = nearest_centers(queries[short], centers, None, count)[1]
        return _rank(queries, centers, candidates, k)[1]

    def _search(self, queries: Tensor, vectors: Tensor, count: int) -> Tensor:
        index = self._index
        if index is None:
            # Built aside and then put in place whole: several threads may arrive here at once.
            index = self._index = _build_index(self.kind, vectors.numpy())
        _, found = index.search(np.ascontiguousarray(queries.numpy()), count)
        return torch.from_numpy(found)


def _build_index(kind: str, vectors: np.ndarray) -> Any:  # noqa: ANN401  # faiss has no types
    vectors = np.ascontiguousarray(vectors)
    count, width = vectors.shape
    if kind == "hnsw":
        index: Any = faiss.IndexHNSWFlat(width, 16)
        index.hnsw.efSearch = 32
        # Insertions race with each other when several threads build the graph.
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            index.add(vectors)
        finally:
            faiss.omp_set_num_threads(threads)
        return index
    if kind == "ivf":
        lists = min(count, round(2 * count**0.5))
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, lists)
        index.cp.min_points_per_centroid = 1  # fewer than FAISS likes are fine here, and its warning is not
        index.nprobe = max(1, lists // 8)
        index.train(vectors)
    else:
        index = faiss.IndexFlatL2(width)
    index.add(vectors)
    return index


def nearest_centers(queries: Tensor, centers: Tensor, axes: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Find each query's k nearest centres with torch alone, on any device.

    The distance matrix, whose rows are ranked by ``|c|^2 / 2 - q.c``, is held a block of rows at a time.

    Args:
        queries: Patch descriptors of shape (Q, D).
        centers: The memory bank's centres of shape (N, D).
        axes: The bank's principal axes of shape (D, R): rank candidates in this projection. None: in full width.
        k: How many to find, at most N.

    Returns:
        Squared distances to the centres, nearest first, and the centres' indices, both of shape (Q, k).
    """
    count = min(_CANDIDATES_PER_NEIGHBOR * k, len(centers))
    # Far from the origin the scores would cancel.
    origin = centers.mean(dim=0)
    vectors = centers - origin if axes is None else (centers - origin) @ axes
    half_norms = vectors.square().sum(dim=1) / 2
    rows = max(1, _BLOCK_BYTES // (4 * len(centers)))
    found = []
    for block in (queries,) if torch.compiler.is_compiling() else queries.split(rows):
        shifted = block - origin if axes is None else (block - origin) @ axes
        scores = torch.addmm(half_norms, shifted, vectors.T, alpha=-1)
        candidates = scores.topk(count, dim=1, largest=False).indices
        found.append(_rank(block, centers, candidates, k))
    squared, indices = zip(*found, strict=True)
    return torch.cat(squared), torch.cat(indices)


def _rank(queries: Tensor, centers: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of some candidates by their exact distances; the search's own may have cancelled."""
    squared, order = squared_distances(queries, centers, candidates).topk(k, dim=1, largest=False)
    return squared, candidates.gather(1, order)


def squared_distances(queries: Tensor, centers: Tensor, indices: Tensor) -> Tensor:
    """Squared Euclidean distances to chosen centres, each as a sum of squared differences, which does not cancel.

    Differentiable in the queries. Neither pass stores more than the result and one block of differences.

    Args:
        queries: Patch descriptors of shape (Q, D).
        centers: The memory bank's centres of shape (N, D).
        indices: For each query the centres to measure, of shape (Q, K).

    Returns:
        Squared distances in float32, of shape (Q, K).
    """
    if torch.compiler.is_compiling():
        return (queries[:, None] - centers[indices]).square().sum(dim=-1)
    return _SquaredDistances.apply(queries.float(), centers.float(), indices)  # type: ignore[no-any-return]


class _SquaredDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, centers: Tensor, indices: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(queries, centers, indices)
        if queries.device.type == "cpu":
            queries, centers, indices = (tensor.contiguous() for tensor in (queries, centers, indices))
            distances = torch.empty(indices.shape)
            pointers = (faiss.swig_ptr(tensor.detach().numpy()) for tensor in (distances, queries, centers, indices))
            measure: Any = faiss.fvec_L2sqr_by_idx  # type: ignore[attr-defined]
            measure(*pointers, queries.shape[1], *indices.shape)
            return distances
        rows = max(1, _BLOCK_BYTES // (4 * queries.shape[1] * indices.shape[1]))
        return torch.cat(
            [
                (block[:, None] - centers[chosen]).square().sum(dim=-1)
                for block, chosen in zip(queries.split(rows), indices.split(rows), strict=True)
            ]
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        # d/dq of g_k |q - c_k|^2, summed over k, is 2 (q sum_k g_k - sum_k g_k c_k).
        queries, centers, indices = ctx.saved_tensors
        pull = torch.nn.functional.embedding_bag(indices, centers, per_sample_weights=grad, mode="sum")
        return 2 * (queries * grad.sum(dim=1, keepdim=True) - pull), None, None
