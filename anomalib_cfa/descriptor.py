"""Patch descriptor: pooled feature pyramid -> target-oriented patch descriptors."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_cfa.whitening import whitening


class PatchDescriptor(nn.Module):
    r"""Learned patch descriptor :math:`\phi`, a CoordConv 1x1 convolution (paper, section III-A).

    The plain formula brings every level to the finest resolution, concatenates the levels with the patch's y and x in
    [-1, 1], and convolves. Resizing and a 1x1 convolution are both linear and the resize's weights sum to one, so they
    commute: here each level is convolved at its own resolution and only then resized and summed. The result is the
    same up to rounding, and no map of all channels at full resolution is ever stored.

    Args:
        channels: Channels of each pyramid level, finest first.
        width: Channels D of a patch descriptor.
        seed: Governs the initial weights, whatever the state of the global generator.

    Example:
        >>> descriptor = PatchDescriptor(channels=(64, 128), width=192)
        >>> descriptor([torch.rand(2, 64, 32, 32), torch.rand(2, 128, 16, 16)]).shape
        torch.Size([2, 32, 32, 192])
    """

    def __init__(self, channels: Sequence[int], width: int, seed: int = 0) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.weight = nn.Parameter(torch.empty(width, sum(channels) + 2))
        self.bias = nn.Parameter(torch.empty(width))
        # PyTorch's own initialisation of a 1x1 convolution, from a generator of its own: a seed that the caller sets
        # (or forgets to set) must not change the bank that is built with these weights.
        bound = (sum(channels) + 2) ** -0.5
        generator = torch.Generator().manual_seed(seed)
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.bias, -bound, bound, generator=generator)

    @property
    def width(self) -> int:
        """Channels D of a patch descriptor."""
        return self.weight.shape[0]

    @torch.no_grad()
    def start_whitened(self, covariance: Tensor, seed: int) -> None:
        """Start from weights that whiten the patch features; those of the coordinates stay.

        Args:
            covariance: Covariance of the patch features, of shape (C, C), C being the channels of all levels.
            seed: Chooses the D of C directions where the descriptor is narrower.
        """
        self.weight[:, : len(covariance)] = whitening(covariance, self.width, seed)
        self.bias.zero_()

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Describe every patch of the finest level.

        Args:
            pyramid: Pooled feature maps of shape (B, C_l, h_l, w_l), finest first.

        Returns:
            Patch descriptors of shape (B, h, w, D), contiguous, h and w being the finest level's.
        """
        height, width = pyramid[0].shape[-2:]
        *level_weights, coordinate_weight = self.weight.split([*self.channels, 2], dim=1)
        summed = rearrange(self._positions(coordinate_weight, height, width), "h w d -> 1 d h w")
        for features, weight in zip(pyramid, level_weights, strict=True):
            described = F.conv2d(features, weight[:, :, None, None])
            if features is not pyramid[0]:
                described = F.interpolate(described, size=(height, width), mode="bilinear", align_corners=False)
            summed = summed + described
        return rearrange(summed, "b d h w -> b h w d").contiguous()

    def _positions(self, weight: Tensor, height: int, width: int) -> Tensor:
        """What the two coordinate channels and the bias add to each patch, of shape (h, w, D)."""
        y, x = (
            2 * torch.arange(size, device=weight.device, dtype=weight.dtype) / max(size - 1, 1) - 1
            for size in (height, width)
        )
        return y[:, None, None] * weight[:, 0] + x[None, :, None] * weight[:, 1] + self.bias
