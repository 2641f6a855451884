"""The method's formulas as they are written, in float64: concatenate, convolve, whole distance matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def describe(pyramid: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """Patch descriptors of shape (B, h, w, D), for a pooled pyramid."""
    batch, _, height, width = pyramid[0].shape
    resized = [F.interpolate(level, (height, width), mode="bilinear", align_corners=False) for level in pyramid]
    y = torch.linspace(-1, 1, height, dtype=weight.dtype).view(1, 1, height, 1).expand(batch, 1, height, width)
    x = torch.linspace(-1, 1, width, dtype=weight.dtype).view(1, 1, 1, width).expand(batch, 1, height, width)
    return F.conv2d(torch.cat([*resized, y, x], dim=1), weight[:, :, None, None], bias).permute(0, 2, 3, 1)


def squared_distances(descriptors: Tensor, centers: Tensor, k: int) -> Tensor:
    """The k smallest squared distances, ordered, of shape (..., k)."""
    # Differences, squared and summed, without holding them all: patches x centres x D are gigabytes.
    matrix = torch.cdist(descriptors, centers, compute_mode="donot_use_mm_for_euclid_dist").square()
    return matrix.topk(k, dim=-1, largest=False).values


def loss(squared: Tensor, radius: Tensor, k: int, j: int, alpha: float, nu: float) -> Tensor:
    """Attraction and repulsion, summed."""
    attraction = (squared[..., :k] - radius**2).clamp(min=0).mean()
    repulsion = (radius**2 - squared[..., k : k + j] - alpha).clamp(min=0).mean()
    return (attraction + repulsion) / nu


def scores(squared: Tensor) -> Tensor:
    """Patch scores, of shape (...)."""
    distances = squared.sqrt()
    weights = torch.exp(-distances) / torch.exp(-distances).sum(dim=-1, keepdim=True)
    return weights[..., 0] * distances[..., 0]
