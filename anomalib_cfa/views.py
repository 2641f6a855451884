"""CFA++: the whole image and its centre as two views that are scored together."""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

_PARTS = 8  # the centre is 7 of 8 parts of a side: the paper's 224 of 256 pixels


def central_view(images: Tensor) -> Tensor:
    """The centre of images, seven eighths of a side, as a batch of smaller images.

    Args:
        images: Images, or maps, of shape (..., H, W).
    """
    (top, height), (left, width) = (_middle(side) for side in images.shape[-2:])
    return images[..., top : top + height, left : left + width]


def average_views(whole: Tensor, central: Tensor) -> Tensor:
    """Average two anomaly maps where both views see the image; elsewhere the whole image's stays.

    Args:
        whole: Maps of whole images, of shape (B, H, W).
        central: Maps of their :func:`central_view`, of shape (B, h, w).

    Returns:
        Maps of shape (B, H, W).
    """
    (top, height), (left, width) = (_middle(side) for side in whole.shape[-2:])
    margins = (left, whole.shape[-1] - left - width, top, whole.shape[-2] - top - height)
    return whole + F.pad((central - central_view(whole)) / 2, margins)


def _middle(side: int) -> tuple[int, int]:
    """Where the central view begins, and its length, both in pixels."""
    length = side * (_PARTS - 1) // _PARTS
    return (side - length) // 2, length
