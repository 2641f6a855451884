"""Nearest-neighbour search over the memory bank: which centres attract a patch, and which repel it."""

from functools import cache
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

SEARCH_KINDS = ("exact", "ivf", "hnsw")

_SPARE_CANDIDATES = 8  # beyond k, for centres that a search's own, rounded distances cannot tell apart
_BLOCK_BYTES = 16 * 2**20  # of a matrix held at a time: what a CPU's caches hold
_BLOCK_BYTES_ON_ACCELERATOR = 256 * 2**20  # where each call costs
_GROUP = 8  # centres of which first only the nearest is ranked
_LISTS_VISITED = 4
_FEWEST_FOR_LISTS = 2048  # centres; fewer are compared with all as fast


class NeighborSearch:
    """Finds the centres of the memory bank nearest to each patch descriptor, as targets of a training step.

    - ``"exact"``: among all centres, by matrix products. Rounding decides between two that are as near, see
      :func:`nearest_centers`.
    - ``"ivf"``: in FAISS's inverted file, which compares a patch with a share of the centres that falls as the bank
      grows; small banks are searched exactly.
    - ``"hnsw"``: along FAISS's graph, whose cost hardly grows.

    On an accelerator, for which FAISS's packages have no build, the search is exact.

    The index is derived from the bank and rebuilt when needed: it is never pickled, copied or read from a file.

    Args:
        kind: One of ``SEARCH_KINDS``.

    Raises:
        ValueError: If ``kind`` is none of these.
    """

    def __init__(self, kind: str = "ivf") -> None:
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
    def __call__(self, queries: Tensor, centers: Tensor, k: int) -> Tensor:
        """Find each query's k nearest centres.

        Args:
            queries: Patch descriptors of shape (Q, D).
            centers: The memory bank's centres of shape (N, D).
            k: How many to find, at most N.

        Returns:
            Indices of the centres, nearest first, of shape (Q, k).
        """
        queries, centers = queries.detach().float(), centers.float()
        is_small = self.kind == "ivf" and len(centers) < _FEWEST_FOR_LISTS
        if self.kind == "exact" or is_small or queries.device.type != "cpu":
            return nearest_centers(queries, centers, k)[1]
        index = self._index
        if index is None:
            # Built aside and then put in place whole: several threads may arrive here at once.
            index = self._index = _build_index(self.kind, np.ascontiguousarray(centers.numpy()))
        found = torch.from_numpy(index.search(np.ascontiguousarray(queries.numpy()), k)[1])
        # Either kind returns -1 where it came across too few: such a query is answered in full.
        short = (found < 0).any(dim=1)
        if short.any():
            found[short] = nearest_centers(queries[short], centers, k)[1]
        return found


def _build_index(kind: str, vectors: np.ndarray) -> Any:  # noqa: ANN401  # faiss has no types
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
    # To find the lists costs as much as to search them where there are about 2 sqrt(N).
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, round(2 * count**0.5))
    index.cp.min_points_per_centroid = 1  # fewer than FAISS likes are fine here, and its warning is not
    index.nprobe = _LISTS_VISITED
    index.train(vectors)
    index.add(vectors)
    return index


def nearest_centers(queries: Tensor, centers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find each query's k nearest centres among all, with torch alone, on any device.

    Candidates are ranked by ``|c|^2 / 2 - q.c``, in bfloat16 where the processor computes in it, and more of them than
    are wanted are then ranked by their distances as sums of squared differences. What is found is the nearest but for
    the ranking's rounding: a centre is missed only where more others than there are spare candidates are as near.
    Of the matrix of all scores a block of rows is held at a time.

    Args:
        queries: Patch descriptors of shape (Q, D).
        centers: The memory bank's centres of shape (N, D).
        k: How many to find, at most N.

    Returns:
        Squared distances to the centres, nearest first, and the centres' indices, both of shape (Q, k).
    """
    count = min(k + _SPARE_CANDIDATES, len(centers))
    # Far from the origin the scores would cancel.
    origin = centers.mean(dim=0)
    vectors = centers - origin
    half_norms = vectors.square().sum(dim=1) / 2
    padding = -len(centers) % _GROUP
    dtype = _ranking_dtype(queries.device.type)
    negated = F.pad(-vectors, (0, 0, 0, padding)).to(dtype)
    half_norms = F.pad(half_norms, (0, padding), value=torch.inf).to(dtype)
    found = []
    for block in queries.split(_block_rows(queries, len(negated))):
        scores = F.linear((block - origin).to(dtype), negated, half_norms)
        # Where a query is nan so are all its scores, and padding may come first.
        candidates = _smallest(scores, count).clamp(max=len(centers) - 1)
        found.append(_rank(block, centers, candidates, k))
    squared, indices = zip(*found, strict=True)
    return torch.cat(squared), torch.cat(indices)


@cache
def _ranking_dtype(device_type: str) -> torch.dtype:
    """The least precise type that is good enough to rank candidates, and that the processor does not emulate."""
    if device_type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device_type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.10 does not tell
        is_native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    else:
        is_native = False
    return torch.bfloat16 if is_native else torch.float32


def _block_rows(like: Tensor, columns: int) -> int:
    """Rows of a block of a float32 matrix of so many columns."""
    held = _BLOCK_BYTES if like.device.type == "cpu" else _BLOCK_BYTES_ON_ACCELERATOR
    return max(1, held // (4 * columns))


def _smallest(scores: Tensor, k: int) -> Tensor:
    """Indices of each row's k smallest values.

    They lie in the k groups of columns whose minima are smallest, and to find minima is much cheaper than to rank.

    Args:
        scores: Values of shape (Q, N), N a multiple of ``_GROUP``.
        k: How many to find.
    """
    groups = scores.shape[1] // _GROUP
    if groups <= k:
        return scores.topk(k, dim=1, largest=False).indices
    members = scores.unflatten(1, (_GROUP, groups))
    nearest = members.amin(dim=1).topk(k, dim=1, largest=False, sorted=False).indices
    inside = members.gather(2, nearest[:, None].expand(-1, _GROUP, -1)).flatten(1)
    places = inside.topk(k, dim=1, largest=False).indices
    smallest: Tensor = places // k * groups + nearest.gather(1, places % k)
    return smallest


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
        rows = _block_rows(queries, queries.shape[1] * indices.shape[1])
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
