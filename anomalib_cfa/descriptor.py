"""Patch descriptor: pooled feature pyramid -> target-oriented patch descriptors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from anomalib_cfa.resize import cache_by_size, resize_weights
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

    All is matrix products, so that training, evaluation and every exported graph compute the same. Products also keep
    their float32 mark in OpenVINO, where other forms lose it (:mod:`anomalib_cfa.export.openvino`).

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
        self._exported: list[Tensor] = []
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Initialize the weights, and read features as they are.

        Args:
            seed: Governs the weights, whatever the state of the global generator.
        """
        self.feature_mean.zero_()
        self.feature_scale.fill_(1)
        # PyTorch's own initialisation of a 1x1 convolution, from a generator of its own: a seed that the caller sets
        # (or forgets to set) must not change the bank that is built with these weights.
        bound = (sum(self.channels) + 2) ** -0.5
        generator = torch.Generator().manual_seed(seed)
        for parameter in (self.weight, self.bias):  # from the CPU's generator, wherever they are
            parameter.copy_(torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=generator))

    @property
    def width(self) -> int:
        """Channels D of a patch descriptor."""
        return self.weight.shape[0]

    @torch.no_grad()
    def start_whitened(self, mean: Tensor, covariance: Tensor, seed: int, power: float) -> None:
        """Start from weights that whiten the patch features; those of the coordinates stay.

        From then on the features are centred, too: otherwise the first steps would move all patches alike, and far.

        Args:
            mean: Mean of the patch features, of shape (C,), C being the channels of all levels.
            covariance: Their covariance, of shape (C, C).
            seed: Chooses the D of C directions where the descriptor is narrower.
            power: How far variances are evened out, from 0, not at all, to 1.
        """
        deviation = covariance.diagonal().mean().sqrt().clamp(min=1e-6)
        scale = _FEATURE_DEVIATION / deviation
        self.feature_scale.copy_(scale)
        self.feature_mean.copy_(mean)
        self.weight[:, : len(covariance)] = whitening(covariance * scale**2, self.width, seed, power)
        self.bias.zero_()

    def affine(self) -> tuple[Tensor, Tensor]:
        """The descriptor as a map of features and coordinates as they are, centring and scale absorbed.

        The weights, of shape (D, C + 2), are for the features of all levels, y and x; the offset is of shape (D,).
        """
        feature_weight, coordinate_weight = self.weight.split([sum(self.channels), 2], dim=1)
        feature_weight = feature_weight * self.feature_scale
        offset = self.bias - feature_weight @ self.feature_mean
        return torch.cat([feature_weight, coordinate_weight], dim=1), offset

    @contextmanager
    def exportable(self) -> Iterator[None]:
        """Work out the weights for an export: its graph would compute them from others, in bfloat16 in OpenVINO."""
        with torch.no_grad():
            self._exported = [part.contiguous().clone() for part in self._parts()]
        try:
            yield
        finally:
            self._exported = []

    def _parts(self) -> list[Tensor]:
        """Weights of each level, of shape (C_l, D), of y and of x, of shape (1, D), and the offset, of shape (D,)."""
        weight, offset = self.affine()
        return [*weight.T.split([*self.channels, 1, 1]), offset]

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Describe every patch of the finest level of a pyramid, by descriptors of shape (B, h, w, D)."""
        finest, *coarser, of_y, of_x, offset = self._exported or self._parts()
        maps = [rearrange(level, "b c h w -> b h w c") for level in pyramid]
        batch, height, width, _ = maps[0].shape
        y, x = (coordinates(size, like=maps[0]) for size in (height, width))
        # The coordinates are a level of two columns, for 1 and x: added on, an exported graph would hold them for all
        # patches. A factor of ones keeps float32 in OpenVINO, where "expand" would not.
        of_one = y @ of_y + offset
        of_coordinates = torch.stack([of_one, of_x.expand_as(of_one)], dim=1)
        rows = [of_coordinates[None] * torch.ones(batch, 1, 1, 1).to(x)]
        columns = [torch.cat([torch.ones_like(x), x], dim=1)]
        for level, level_weight in zip(maps[1:], coarser, strict=True):
            projected = (level @ level_weight).flatten(2)
            to_height, to_width = (
                upsampling(size, new_size, like=level)
                for size, new_size in zip(level.shape[1:3], (height, width), strict=True)
            )
            rows.append((to_height[None] @ projected).reshape(batch, height, level.shape[2], -1))
            columns.append(to_width)
        described: Tensor = torch.cat(columns, dim=1)[None, None] @ torch.cat(rows, dim=2) + maps[0] @ finest
        return described


@cache_by_size
def coordinates(size: int) -> Tensor:
    """Coordinates of ``size`` patches along an axis, from -1 to 1, of shape (size, 1). A single one has 0."""
    centred = (2 * torch.arange(size)[:, None] - (size - 1)).float()
    steps: Any = torch.sym_max(size - 1, 1)
    scaled: Tensor = centred * (1 / steps)
    return scaled


@cache_by_size
def upsampling(size: int, new_size: int) -> Tensor:
    """Weights that resize an axis as in the plain formula, of shape (new_size, size)."""
    return resize_weights(size, new_size, antialias=False)
