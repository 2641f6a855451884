"""Patch descriptor: pooled feature pyramid -> target-oriented patch descriptors."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_cfa.whitening import whitening

# Standard deviation to which the features of other backbones and layers are scaled for a whitened start: that of the
# ResNet's, which the authors' learning rate suits. Adam's steps do not scale with the weights.
_FEATURE_DEVIATION = 0.1


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

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, channels: Sequence[int], width: int, seed: int = 0) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.weight = nn.Parameter(torch.empty(width, sum(channels) + 2))
        self.bias = nn.Parameter(torch.empty(width))
        self.register_buffer("feature_mean", torch.zeros(sum(channels)))
        self.register_buffer("feature_scale", torch.ones(()))
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
    def start_whitened(self, mean: Tensor, covariance: Tensor, seed: int, power: float) -> None:
        """Start from weights that whiten the patch features; those of the coordinates stay.

        From then on the features are centred, too: else the first steps would move all patches alike, and far.

        Args:
            mean: Mean of the patch features, of shape (C,).
            covariance: Covariance of the patch features, of shape (C, C), C being the channels of all levels.
            seed: Chooses the D of C directions where the descriptor is narrower.
            power: How far variances are evened out, from 0, not at all, to 1.
        """
        deviation = covariance.diagonal().mean().sqrt().clamp(min=1e-6)
        scale = _FEATURE_DEVIATION / deviation
        self.feature_scale.copy_(scale)
        self.feature_mean.copy_(mean)
        self.weight[:, : len(covariance)] = whitening(covariance * scale**2, self.width, seed, power)
        self.bias.zero_()

    def affine(self, dtype: torch.dtype | None = None) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The descriptor as a map of features as they are, their centring and scale absorbed.

        Args:
            dtype: To compute it in. Defaults to the weights' own.

        Returns:
            Weights of each level, of shape (D, C_l), of y and x, of shape (D, 2), and the offset, of shape (D,).
        """
        weight, bias, mean, scale = (
            tensor.to(dtype) for tensor in (self.weight, self.bias, self.feature_mean, self.feature_scale)
        )
        feature_weight, coordinate_weight = weight.split([sum(self.channels), 2], dim=1)
        feature_weight = feature_weight * scale
        return feature_weight.split(self.channels, dim=1), coordinate_weight, bias - feature_weight @ mean

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Describe every patch of the finest level.

        Args:
            pyramid: Pooled feature maps of shape (B, C_l, h_l, w_l), finest first.

        Returns:
            Patch descriptors of shape (B, h, w, D), contiguous, h and w being the finest level's.
        """
        height, width = pyramid[0].shape[-2:]
        level_weights, coordinate_weight, offset = self.affine()
        at_patch = patch_coordinates(height, width, offset) @ coordinate_weight.T + offset
        # Channels last throughout: as a matrix product for each level, each patch's descriptor in one piece. In place,
        # since maps of this size cost as much to allocate as to add.
        finest, *coarser = (
            F.linear(rearrange(features, "b c h w -> b h w c"), weight)
            for features, weight in zip(pyramid, level_weights, strict=True)
        )
        descriptors: Tensor = finest.add_(at_patch)
        for level in coarser:
            descriptors.add_(_resize(level, height, width))
        return descriptors


def _resize(maps: Tensor, height: int, width: int) -> Tensor:
    """Resize channels-last maps of shape (B, h_l, w_l, D) bilinearly to (B, height, width, D)."""
    maps = rearrange(maps, "b h w d -> b d h w")
    resized = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    return rearrange(resized, "b d h w -> b h w d")


def patch_coordinates(height: int, width: int, like: Tensor) -> Tensor:
    """Each patch's y and x in [-1, 1], of shape (h, w, 2)."""
    y, x = (
        2 * torch.arange(size, device=like.device, dtype=like.dtype) / max(size - 1, 1) - 1 for size in (height, width)
    )
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)
