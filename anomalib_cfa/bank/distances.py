"""Squared distances between chosen pairs of vectors, each as a sum of squared differences, which does not cancel."""

from typing import Any

import faiss
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

_BLOCK_BYTES = 16 * 2**20  # of a matrix at a time: fits a CPU's caches
_BLOCK_BYTES_ON_ACCELERATOR = 256 * 2**20  # where each call has a fixed cost


@torch.compiler.disable  # type: ignore[untyped-decorator]  # FAISS takes addresses, which no compiler follows
def squared_distances(queries: Tensor, vectors: Tensor, indices: Tensor) -> Tensor:
    """Squared Euclidean distances of queries, of shape (Q, D), to the vectors chosen for each.

    The indices, of shape (Q, K), choose among the vectors, of shape (N, D). The distances are of shape (Q, K), in
    float32 and differentiable in the queries. Neither pass stores more than them and one block of differences.
    """
    return _SquaredDistances.apply(queries.float(), vectors.float(), indices)  # type: ignore[no-any-return]


def block_rows(like: Tensor, columns: int) -> int:
    """How many rows of a float32 matrix with this many columns make up a block."""
    held = _BLOCK_BYTES if like.device.type == "cpu" else _BLOCK_BYTES_ON_ACCELERATOR
    return max(1, held // (4 * max(columns, 1)))


class _SquaredDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, vectors: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(queries, vectors, indices)
        if queries.device.type == "cpu":
            queries, vectors, indices = (tensor.contiguous() for tensor in (queries, vectors, indices))
            distances = torch.empty(indices.shape)
            pointers = (faiss.swig_ptr(tensor.detach().numpy()) for tensor in (distances, queries, vectors, indices))
            measure: Any = faiss.fvec_L2sqr_by_idx  # type: ignore[attr-defined]
            measure(*pointers, queries.shape[1], *indices.shape)
            return distances
        rows = block_rows(queries, queries.shape[1] * indices.shape[1])
        return torch.cat(
            [
                (block[:, None] - vectors[chosen]).square().sum(dim=-1)
                for block, chosen in zip(queries.split(rows), indices.split(rows), strict=True)
            ]
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # d/dq of g_k |q - v_k|^2, summed over k, is 2 (q sum_k g_k - sum_k g_k v_k).
        queries, vectors, indices = ctx.saved_tensors
        pull = F.embedding_bag(indices, vectors, per_sample_weights=grad, mode="sum")
        return 2 * (queries * grad.sum(dim=1, keepdim=True) - pull), None, None
