"""A start for the patch descriptor that fits the target: patch features whitened, or partly so.

At a random start the distance between patches is that of raw ImageNet features: dominated by the few directions in
which they vary most, which on a target are nuisances (exposure, contrast) that differ between normal images. Training
contracts these directions, over many epochs. Whitening contracts them before the first step. Half of it is best: what
varies most is not all nuisance, and what hardly varies is mostly noise.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_cfa.processes import Processes

_PATCHES_PER_IMAGE = 64
_SHRINKAGE = 0.01  # of the mean variance, added to each: directions of tiny variance are mostly rounding


class PatchStatistics:
    """Accumulates the covariance of patch features, over patches spread evenly over each image."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.products: Tensor | None = None

    def update(self, pyramid: Sequence[Tensor]) -> None:
        """Take in some images' pooled feature maps, of shape (B, C_l, h_l, w_l), finest first."""
        size = height, width = pyramid[0].shape[-2:]
        step = max(1, round((height * width / _PATCHES_PER_IMAGE) ** 0.5))
        levels = [
            F.interpolate(level.float(), size=size, mode="bilinear", align_corners=False)[..., ::step, ::step]
            for level in pyramid
        ]
        patches = rearrange(torch.cat(levels, dim=1), "b c h w -> (b h w) c").double()
        total, products = patches.sum(dim=0), patches.T @ patches
        self.count += len(patches)
        self.total = total if self.total is None else self.total + total
        self.products = products if self.products is None else self.products + products

    def moments(self, processes: Processes) -> tuple[Tensor, Tensor]:
        """Mean (C,) and covariance (C, C) of the patch features that all processes took in.

        Raises:
            ValueError: If there was no image.
        """
        if self.total is None or self.products is None:
            msg = "There must be at least one normal image, but there is none"
            raise ValueError(msg)
        count = processes.sum(torch.tensor(self.count, device=self.total.device))
        mean = processes.sum(self.total) / count
        return mean, processes.sum(self.products) / count - torch.outer(mean, mean)


def whitening(covariance: Tensor, width: int, seed: int, power: float) -> Tensor:
    """A linear map that evens out the variances of features of this covariance.

    A variance v becomes about v to the power of 1 - ``power``. The map is scaled so that the squared distance of a
    mapped feature from their mean is 1 on average, whatever the backbone: the radius and the margin of the loss are on
    that scale.

    Args:
        covariance: Covariance of shape (C, C).
        width: Output channels D. If fewer than C: those of a random rotation; if more: the rest is zero.
        seed: Governs the rotation.
        power: 1 makes all variances alike, 0 leaves their proportions as they are.

    Returns:
        The map, of shape (D, C).
    """
    channels = len(covariance)
    variances, axes = torch.linalg.eigh(covariance)
    variances = variances.clamp(min=0)
    scale = (variances / variances.mean().clamp(min=1e-12) + _SHRINKAGE).pow(-power / 2)
    squared_distance = (scale.square() * variances).sum() * min(width, channels) / channels
    weight = scale[:, None] * axes.T / squared_distance.clamp(min=1e-12).sqrt()
    if width < channels:
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(channels, width, generator=generator, dtype=torch.float64).to(weight.device)
        weight = torch.linalg.qr(random).Q.T @ weight
    return F.pad(weight, (0, 0, 0, max(width - channels, 0)))
