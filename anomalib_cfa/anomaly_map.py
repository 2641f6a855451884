"""Scores of patches -> anomaly map and score of the image."""

import torch
from anomalib.models.components.filters.blur import compute_kernel_size
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_cfa.resize import cache_by_size, resize_weights

_PARTS = 8  # the central view is 7 of 8 parts of a side: the paper's 224 of 256 pixels


def softmin_scores(distances: Tensor) -> Tensor:
    """Score each patch by its distances (..., K), nearest first, to the K nearest centres (paper, section III-D).

    The nearest distance is weighted by its softmin among the K: a patch that lies about as close to several centres
    is less certainly normal than one that has a centre of its own.

    Example:
        >>> softmin_scores(torch.tensor([[2.0, 2.0]]))
        tensor([1.])
    """
    nearest = distances[..., 0]
    return F.softmin(distances, dim=-1)[..., 0] * nearest


class AnomalyMapGenerator(nn.Module):
    """Bring patch scores to the image's size and smooth them with a Gaussian.

    Both are linear and separable, so that they are one matrix product along each axis.

    Args:
        sigma: Standard deviation of the Gaussian in pixels.

    Example:
        >>> AnomalyMapGenerator(sigma=4)(torch.rand(2, 16, 16), (64, 64)).shape
        torch.Size([2, 64, 64])
    """

    kernel: Tensor

    def __init__(self, sigma: float = 4.0) -> None:
        super().__init__()
        self.sigma = sigma
        self.register_buffer("kernel", gaussian_kernel(sigma), persistent=False)  # a constant of exported graphs
        self.min_image_size = len(self.kernel) // 2 + 1  # the blur reflects at the border

    def forward(self, scores: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Make anomaly maps, of shape (B, *image_size), of patch scores, of shape (B, h, w)."""
        rows, columns = (
            smoothed_resize_weights(patches, pixels, self.kernel)
            if torch.compiler.is_exporting()
            else _smoothing(patches, pixels, self.sigma, like=scores)
            for patches, pixels in zip(scores.shape[1:], image_size, strict=True)
        )
        with torch.autocast(scores.device.type, enabled=False):  # scores keep all of their digits
            anomaly_map: Tensor = rows.T[None] @ scores @ columns[None]
        return anomaly_map


def gaussian_kernel(sigma: float) -> Tensor:
    """A Gaussian of this standard deviation in pixels, cut off where anomalib cuts its own; it sums to 1."""
    taps = compute_kernel_size(sigma)
    offsets = torch.arange(taps, dtype=torch.float64) - taps // 2  # in float32 a tiny sigma is zero
    kernel = torch.exp(-(offsets / sigma).square() / 2)
    return (kernel / kernel.sum()).float()


@cache_by_size
def _smoothing(size: int, new_size: int, sigma: float) -> Tensor:
    return smoothed_resize_weights(size, new_size, gaussian_kernel(sigma))


def smoothed_resize_weights(size: int, new_size: int, kernel: Tensor) -> Tensor:
    """Weights (size, new_size) that resize one axis bilinearly, and smooth it with a kernel.

    The kernel is symmetric, of an odd number of taps. The sizes, of which the new one is more than half of the
    kernel's, may be symbolic.
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
    resize = resize_weights(size, new_size, antialias=False, dtype=kernel.dtype, device=kernel.device)
    return resize.T @ smooth


def central_view(images: Tensor) -> Tensor:
    """The centre of images or maps (..., H, W), seven eighths of a side, as smaller ones (CFA++)."""
    (top, height), (left, width) = (_middle(side) for side in images.shape[-2:])
    return images[..., top : top + height, left : left + width]


def average_views(whole: Tensor, central: Tensor) -> Tensor:
    """Average maps (B, H, W) with those of their :func:`central_view` where both views see the image (CFA++)."""
    (top, height), (left, width) = (_middle(side) for side in whole.shape[-2:])
    margins = (left, whole.shape[-1] - left - width, top, whole.shape[-2] - top - height)
    return whole + F.pad((central - central_view(whole)) / 2, margins)


def _middle(side: int) -> tuple[int, int]:
    """Where the central view begins, and its length, both in pixels."""
    length = side * (_PARTS - 1) // _PARTS
    return (side - length) // 2, length
