"""Linear maps of the patch features, in the form in which they are exported: matrix products of each level."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from anomalib_cfa.resize import resize_weights


@dataclass(frozen=True)
class PatchGrid:
    """What brings the levels of a pyramid to the patches of its finest level.

    Attributes:
        resizes: Weights of shape (1, h, h_l) and (w, w_l) for each level but the finest, or None for one that is as
            fine as that.
        y: The patches' y in [-1, 1], of shape (h, 1).
        x: The patches' x in [-1, 1], of shape (w, 1).
    """

    resizes: Sequence[tuple[Tensor, Tensor]]
    y: Tensor
    x: Tensor

    @staticmethod
    def of(maps: Sequence[Tensor]) -> "PatchGrid":
        """The grid of channels-last maps of shape (B, h_l, w_l, C_l), finest first."""
        height, width = maps[0].shape[1:3]
        device = maps[0].device
        resizes = [
            (
                resize_weights(level.shape[1], height, antialias=False, device=device)[None],
                resize_weights(level.shape[2], width, antialias=False, device=device),
            )
            for level in maps[1:]
        ]
        y, x = (_coordinates(size, device) for size in (height, width))
        return PatchGrid(resizes, y, x)


class PyramidProjection(nn.Module):
    """A CoordConv 1x1 convolution of the pyramid (paper, section III-A), or a part of its output channels.

    Each level is multiplied at its own resolution and only then resized; see
    :class:`~anomalib_cfa.descriptor.PatchDescriptor`. All is matrix products, and the last one sums the levels: these
    forms keep their mark, and with it float32, in OpenVINO (:mod:`anomalib_cfa.export.openvino`).

    Args:
        level_weights: Weights of shape (out, C_l) for each level, finest first; None for one that is not read.
        coordinate_weight: Weights of y and x, of shape (out, 2).
        bias: The rest, of shape (out,).
    """

    coordinate_weight: Tensor
    bias: Tensor

    def __init__(self, level_weights: Sequence[Tensor | None], coordinate_weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        for level, weight in enumerate(level_weights):
            self.register_buffer(
                f"weight_{level}", None if weight is None else weight.T[None, None].float().contiguous()
            )
        self.register_buffer("coordinate_weight", coordinate_weight.T.float().contiguous())
        self.register_buffer("bias", bias.float())

    def forward(self, maps: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        """Project every patch of the finest level.

        Args:
            maps: Feature maps of shape (B, h_l, w_l, C_l), finest first, the channels last.
            grid: The maps' grid.

        Returns:
            Projections of shape (B, h, w, out).
        """
        batch, height, _, _ = maps[0].shape
        finest, *weights = (getattr(self, f"weight_{level}") for level in range(len(maps)))
        of_y, of_x = self.coordinate_weight
        # Coordinates are a level of two columns, for 1 and x. Added on, they would be folded into one constant for all
        # patches, which for the rankings means all patches x all centres.
        of_one = grid.y * of_y + self.bias
        coordinates = torch.stack([of_one, of_x.expand_as(of_one)], dim=1)
        # A factor of ones keeps float32 in OpenVINO, where "expand" would not.
        rows = [coordinates[None] * torch.ones(batch, 1, 1, 1, device=coordinates.device)]
        columns = [torch.cat([torch.ones_like(grid.x), grid.x], dim=1)]
        for level, weight, (to_height, to_width) in zip(maps[1:], weights, grid.resizes, strict=True):
            if weight is None:
                continue
            projected = (level @ weight).flatten(2)
            rows.append((to_height @ projected).reshape(batch, height, level.shape[2], -1))
            columns.append(to_width)
        projections: Tensor = torch.cat(columns, dim=1)[None, None] @ torch.cat(rows, dim=2)
        if finest is not None:
            projections = projections + maps[0] @ finest
        return projections


def _coordinates(size: int, device: torch.device) -> Tensor:
    """From -1 to 1, of shape (size, 1)."""
    centred: Tensor = (2 * torch.arange(size, device=device)[:, None] - (size - 1)).float()
    steps: Any = torch.sym_max(size - 1, 1)
    scaled: Tensor = centred * (1 / steps)
    return scaled


def turned(level_weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Turn the output channels of a linear map so that as many as possible read coarse levels alone.

    An orthogonal turn leaves distances as they are. After that of a QR decomposition the first C_1 channels read every
    level, the next C_2 all but the finest, and so on: less to multiply at the fine resolutions.

    Args:
        level_weights: Weights of shape (D, C_l), finest first.

    Returns:
        The turn, of shape (D, D), and the turned level weights, each without the last channels if they do not read it.
    """
    *finer, coarsest = level_weights
    # On the CPU, as not every accelerator has it.
    read = torch.cat([coarsest[:, :0], *finer], dim=1).cpu()
    turn = torch.linalg.qr(read, mode="complete").Q.T.to(coarsest.device)
    stops = accumulate(weight.shape[1] for weight in finer)
    return turn, [*(turn[:stop] @ weight for weight, stop in zip(finer, stops, strict=True)), turn @ coarsest]


def bands(level_weights: Sequence[Tensor], rest: Sequence[Tensor]) -> list[tuple[list[Tensor | None], list[Tensor]]]:
    """Part the output channels of a linear map, :func:`turned`, by the levels that they read.

    Args:
        level_weights: Weights of shape (D, C_l), finest first.
        rest: What lives in the same D channels and is turned with them, of shape (D, ...).

    Returns:
        For each band of channels the level weights, None for those that it does not read, and its part of the rest.
    """
    turn, level_weights = turned(level_weights)
    stops = sorted({len(weight) for weight in level_weights})
    return [
        (
            [weight[start:stop] if stop <= len(weight) else None for weight in level_weights],
            [turn[start:stop] @ other for other in rest],
        )
        for start, stop in pairwise([0, *stops])
    ]
