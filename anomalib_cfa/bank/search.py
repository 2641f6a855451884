"""Nearest-neighbour search over the memory bank, by one rule in training, evaluation and every exported graph.

The centres are parted into groups of neighbours. The patches of a small block of the image, which resemble each other,
are compared together: first with the groups' means, then with the centres of the groups that lead, in the bank's
leading principal directions; the few centres that lead for a patch are measured exactly. The work hardly grows with the
bank, and no matrix of patches x centres is ever held.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_cfa.bank.distances import block_rows, squared_distances

SEARCH_KINDS = ("two_level", "exact")

_DIRECTIONS = 64  # principal directions of the bank in which centres are ranked
_GROUP = 16  # centres in a group, at most; as many as patches in a block
_PROBES = 64  # groups whose centres a block of patches is compared with
_SIDE = 4  # patches along a side of a block
_SPARE_CANDIDATES = 7  # measured beyond those wanted, since few directions do not rank exactly
_POWER_ITERATIONS = 4
_FAR = 1e30  # in place of half the squared norm where a group has no centre


class CenterIndex(nn.Module):
    """Finds the centres nearest to each patch descriptor.

    It is derived from the centres and rebuilt from them: none of its tensors is part of a state dict. A bank with no
    more centres than a block is compared with is ranked whole.

    Args:
        centers: The memory bank's centres of shape (N, D), finite.
        kind: ``"two_level"``, or ``"exact"`` to rank all centres in all directions, at a cost of patches x centres.

    Example:
        >>> centers = torch.randn(4096, 96, generator=torch.Generator().manual_seed(0))
        >>> index = CenterIndex(centers)
        >>> squared, found = index(centers[7].expand(1, 2, 2, 96), k=1)
        >>> found.flatten().tolist()
        [7, 7, 7, 7]
    """

    centers: Tensor
    minus_origin: Tensor
    minus_directions: Tensor
    table: Tensor
    means: Tensor
    members: Tensor

    @torch.no_grad()
    def __init__(self, centers: Tensor, kind: str = "two_level") -> None:
        super().__init__()
        count, width = centers.shape
        centers = centers.detach().float()
        # Far from the origin the ranking would lose its digits to cancellation.
        origin = centers.mean(dim=0)
        self.has_two_levels = kind == "two_level" and count > _GROUP * _PROBES
        directions = torch.eye(width, device=centers.device)
        if self.has_two_levels and width > _DIRECTIONS:
            directions = _principal_directions(centers - origin)
        projected = (centers - origin) @ directions
        table = _with_half_norm(projected)
        buffers = {"centers": centers, "minus_origin": -origin, "minus_directions": -directions}
        if self.has_two_levels:
            groups = _part(projected, torch.arange(count, device=table.device), -(-count // _GROUP))
            members = nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=count)
            members = F.pad(members, (0, _GROUP - members.shape[1]), value=count)
            means = torch.stack([projected[group].mean(dim=0) for group in groups])
            buffers |= {"members": members, "means": _with_half_norm(means)}
            # Stored group by group, as groups are read whole; the extra row stands for empty places.
            nowhere = torch.zeros_like(table[:1])
            nowhere[:, -1] = _FAR
            table = torch.cat([table, nowhere])[members].flatten(1)
        for name, tensor in (buffers | {"table": table}).items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)

    def forward(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find and measure the k nearest centres, see :meth:`~anomalib_cfa.bank.memory_bank.MemoryBank.nearest`."""
        with torch.autocast(queries.device.type, enabled=False):
            queries = queries.float()
            if torch.compiler.is_exporting():
                candidates = self._candidates(queries, k)
                squared = self._measure_in_graph(queries, candidates)
            else:
                with torch.no_grad():
                    candidates = self._candidates(queries.detach(), k)
                squared = squared_distances(queries.flatten(0, 2), self.centers, candidates.flatten(0, 2))
                squared = squared.view(candidates.shape)
            squared, order = squared.topk(k, dim=-1, largest=False)
            return squared, candidates.gather(-1, order)

    @torch.no_grad()
    def neighbors(self, k: int) -> Tensor:
        """Indices of the k centres nearest to each centre, itself included, of shape (N, k)."""
        if not self.has_two_levels:
            whole: Tensor = self(self.centers[:, None, None], k)[1]
            return whole[:, 0, 0]
        count = len(self.centers)
        groups = self.centers[self.members.clamp(max=count - 1)]  # each group poses as a block of patches
        found = self(groups.unflatten(1, (_SIDE, _SIDE)), k)[1].flatten(0, 2)
        place = self.members.flatten()
        neighbors = torch.empty_like(found[:count])
        neighbors[place[place < count]] = found[place < count]
        return neighbors

    @torch.no_grad()
    def nearest_of_others(self, queries: Tensor, owners: Tensor, asking: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k centres nearest to each query that are not its owner's, ranked and measured as all others are.

        Args:
            queries: Patch descriptors of any images, of shape (Q, D).
            owners: Each centre's owner, of shape (N,).
            asking: The owner that asks, of each query, of shape (Q,).
            k: How many.

        Returns:
            Squared distances and indices, nearest first, of shape (Q, k); infinite where there are no more centres.
        """
        places = torch.arange(len(self.centers), device=owners.device)
        if self.has_two_levels:
            places = self.members.flatten()
            places = places[places < len(self.centers)]
        with torch.autocast(queries.device.type, enabled=False):
            projected = self._project(queries.float())
            table = self.table.reshape(-1, projected.shape[-1])
            table, owned_by, found = table[table[:, -1] < _FAR], owners[places], []
            rows = block_rows(queries, len(table))
            for block, of_block in zip(projected.split(rows), asking.split(rows), strict=True):
                ranks = (block @ table.T).masked_fill_(owned_by == of_block[:, None], torch.inf)
                found.append(places[_smallest(ranks, min(k + _SPARE_CANDIDATES, len(table)))])
        candidates = torch.cat(found)
        squared = squared_distances(queries, self.centers, candidates)
        squared, order = squared.masked_fill(owners[candidates] == asking[:, None], torch.inf).topk(k, largest=False)
        return squared, candidates.gather(1, order)

    def _project(self, queries: Tensor) -> Tensor:
        """Queries in the bank's leading directions, negated, and 1: (-q, 1).

        A product with the tables' rows, (c, |c|^2 / 2), ranks centres by |c|^2 / 2 - c.q. Differences are sums here and
        below: see anomalib_cfa.export.openvino.
        """
        projected = (queries + self.minus_origin) @ self.minus_directions
        return torch.cat([projected, torch.ones_like(projected[..., :1])], dim=-1)

    def _candidates(self, queries: Tensor, k: int) -> Tensor:
        """Centres that may be the nearest ones, of shape (B, h, w, candidates)."""
        projected = self._project(queries)
        count = min(k + _SPARE_CANDIDATES, len(self.centers))
        if not self.has_two_levels:
            parts = _parts(projected.flatten(0, 2), len(self.centers))
            found = torch.cat([_smallest(part @ self.table.T, count) for part in parts])
            return found.view(*queries.shape[:-1], count)
        batch, height, width, _ = queries.shape
        blocks = _in_blocks(projected)
        probes = _smallest(blocks.mean(dim=2) @ self.means.T, _PROBES)
        read = _PROBES * self.table.shape[1]
        best = torch.cat(
            [
                _smallest(F.embedding(part, self.table).unflatten(-1, (_GROUP, -1)).flatten(1, 2) @ block, count, dim=1)
                for part, block in zip(_parts(probes, read), _parts(blocks, read), strict=True)
            ]
        )
        members = F.embedding(probes, self.members).flatten(1)
        first = torch.arange(members.shape[0], device=members.device)[:, None, None] * (_GROUP * _PROBES)
        candidates = F.embedding(best + first, members.flatten()[:, None])[..., 0]
        rows = (height + _SIDE - 1) // _SIDE
        whole: Tensor = rearrange(candidates, "(b i j) c (y x) -> b (i y) (j x) c", b=batch, i=rows, y=_SIDE)
        return whole[:, :height, :width]

    def _measure_in_graph(self, queries: Tensor, candidates: Tensor) -> Tensor:
        negated = -self.centers
        distances = [
            (queries + F.embedding(candidate, negated)).square().sum(dim=-1, keepdim=True)
            for candidate in candidates.unbind(dim=-1)
        ]
        return torch.cat(distances, dim=-1)


def _parts(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Rows in about equal parts, each of which leads to a block of memory with so many columns; in a graph, in one."""
    if torch.compiler.is_exporting():
        return (rows,)
    return rows.chunk(max(1, -(-len(rows) // block_rows(rows, columns))))


def _in_blocks(patches: Tensor) -> Tensor:
    """Patches of shape (B, h, w, d) as square blocks of them, of shape (blocks, d, 16); the last ones are repeated."""
    for axis in (1, 2):
        size = patches.shape[axis]
        if isinstance(size, int) and size % _SIDE == 0:
            continue
        wanted = (size + _SIDE - 1) // _SIDE * _SIDE
        patches = patches.index_select(axis, torch.arange(wanted, device=patches.device).clamp(max=size - 1))
    blocks: Tensor = rearrange(patches, "b (i y) (j x) d -> (b i j) d (y x)", y=_SIDE, x=_SIDE)
    return blocks


def _with_half_norm(vectors: Tensor) -> Tensor:
    """Vectors, and half of their squared norms as one more column."""
    return torch.cat([vectors, vectors.square().sum(dim=1, keepdim=True) / 2], dim=1)


def _smallest(ranks: Tensor, k: int, dim: int = -1) -> Tensor:
    """Indices of the k smallest values along a dimension, in any order."""
    return ranks.topk(k, dim=dim, largest=False, sorted=False).indices


def _principal_directions(centered: Tensor) -> Tensor:
    """The leading principal directions of centred vectors, of shape (D, 64)."""
    covariance = centered.double().T @ centered.double()
    # On the CPU, as not every accelerator has it.
    axes: Tensor = torch.linalg.eigh(covariance.cpu()).eigenvectors
    return axes[:, -_DIRECTIONS:].flip(1).to(centered)


def _part(vectors: Tensor, chosen: Tensor, groups: int) -> list[Tensor]:
    """Part the chosen vectors into groups of neighbours of about one size: indices, by cuts across what varies most."""
    if groups == 1:
        return [chosen]
    members = vectors[chosen]
    members = members - members.mean(dim=0)
    direction = members[members.square().sum(dim=1).argmax()]
    for _ in range(_POWER_ITERATIONS):
        direction = F.normalize(members.T @ (members @ direction), dim=0)
    order = chosen[(members @ direction).argsort(stable=True)]
    first = groups // 2
    cut = len(order) * first // groups
    return [*_part(vectors, order[:cut], first), *_part(vectors, order[cut:], groups - first)]
