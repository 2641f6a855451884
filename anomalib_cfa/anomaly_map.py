"""Scores of patches -> anomaly map and score of the image."""

import torch
from anomalib.models.components.filters.blur import GaussianBlur2d, compute_kernel_size
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_cfa.resize import resize_weights


def softmin_scores(distances: Tensor) -> Tensor:
    """Score each patch by its distances to the K nearest centres (paper, section III-D).

    The nearest distance is weighted by its softmin among the K: a patch that lies about as close to several centres
    is less certainly normal than one that has a centre of its own.

    Args:
        distances: Distances, not squared, to the K nearest centres, nearest first, of shape (..., K).

    Returns:
        Scores of shape (...).

    Example:
        >>> softmin_scores(torch.tensor([[2.0, 2.0]]))
        tensor([1.])
    """
    nearest = distances[..., 0]
    return F.softmin(distances, dim=-1)[..., 0] * nearest


class AnomalyMapGenerator(nn.Module):
    """Bring patch scores to the image's size and smooth them with a Gaussian.

    Args:
        sigma: Standard deviation of the Gaussian in pixels.

    Example:
        >>> AnomalyMapGenerator(sigma=4)(torch.rand(2, 16, 16), (64, 64)).shape
        torch.Size([2, 1, 64, 64])
    """

    def __init__(self, sigma: float = 4.0) -> None:
        super().__init__()
        taps = compute_kernel_size(sigma)
        # A Gaussian is separable: two passes of n taps in place of one of n x n.
        self.blur = nn.Sequential(
            GaussianBlur2d(sigma=sigma, kernel_size=(taps, 1)), GaussianBlur2d(sigma=sigma, kernel_size=(1, taps))
        )
        self.min_image_size = taps // 2 + 1  # the blur reflects at the border

    @property
    def kernel(self) -> Tensor:
        """The Gaussian along one axis, of shape (taps,)."""
        first = self.blur[0]
        assert isinstance(first, GaussianBlur2d)
        return first.kernel.flatten()

    def forward(self, scores: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Make the anomaly map.

        Args:
            scores: Patch scores of shape (B, h, w).
            image_size: Height and width of the map, in pixels.

        Returns:
            Anomaly maps of shape (B, 1, *image_size).
        """
        anomaly_map = F.interpolate(scores[:, None], size=image_size, mode="bilinear", align_corners=False)
        smoothed: Tensor = self.blur(anomaly_map)
        return smoothed


def smoothed_resize_weights(size: int, new_size: int, kernel: Tensor) -> Tensor:
    """Weights that do along one axis what :class:`AnomalyMapGenerator` does: resize, and smooth with a kernel.

    Args:
        size: Patches along the axis; may be symbolic, as ``new_size``.
        new_size: Pixels wanted, more than half of the kernel.
        kernel: A symmetric kernel of an odd number of taps.

    Returns:
        Weights of shape (size, new_size), to be multiplied from the right.
    """
    radius = len(kernel) // 2
    decay = F.pad(kernel[radius:], (0, 1))[:, None]
    new_pixel = torch.arange(new_size, device=kernel.device)
    pixel, last = new_pixel[:, None], new_size - 1

    def taps(offsets: Tensor) -> Tensor:
        return F.embedding(offsets.abs().clamp(max=radius + 1), decay)[..., 0]

    # Beyond its ends the axis is mirrored, without repeating the last pixel.
    smooth = taps(new_pixel - pixel)
    smooth = smooth + taps(new_pixel + pixel) * (pixel > 0) + taps(new_pixel + pixel - 2 * last) * (pixel < last)
    return resize_weights(size, new_size, antialias=False, device=kernel.device).T @ smooth
