"""Which training images fit the others worst: where users' normal images are not all normal, those are the first."""

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WorstFitting = list[tuple[str, float]]
"""Paths of training images and their scores, the worst first."""

_FEWEST_IMAGES = 8  # of which it can be said what is usual
_MOST_NAMED = 5
_MAD_OF_NORMAL = 1.4826  # median absolute deviations make a standard deviation of normally distributed values
_DEVIATIONS = 5.0
_LEAST_DEVIATION = 1e-3  # of the median: where images are copies of each other, rounding does not count


def stand_out(scores: Tensor) -> Tensor:
    """Say which scores are far above the rest, however many of the rest are odd themselves, up to half.

    They lie more than five deviations above the median, a deviation being 1.4826 median absolute deviations.

    Args:
        scores: Of shape (n,), finite.

    Returns:
        The indices of five at most, the largest score first; none where there are fewer than eight scores, or where
        most are zero, as those of copies are: then no scale tells what is far.

    Example:
        >>> stand_out(torch.tensor([3.0, 1.0, 2.0, 9.0, 2.0, 1.0, 3.0, 2.0, 20.0])).tolist()
        [8]
    """
    if len(scores) < _FEWEST_IMAGES:
        return torch.empty(0, dtype=torch.int64)
    median = scores.median()
    deviation = _MAD_OF_NORMAL * (scores - median).abs().median()
    values, order = scores.topk(min(_MOST_NAMED, len(scores)))
    if deviation == 0 and median <= 0:
        return order[:0]
    return order[values > median + _DEVIATIONS * torch.maximum(deviation, _LEAST_DEVIATION * median.abs())]


def log_worst(worst: WorstFitting, images: int) -> None:
    """Name the images that fit worst, for a person to look at.

    Args:
        worst: Their paths and scores.
        images: How many were looked at.
    """
    if not worst:
        few = f"{images} training images are too few to tell which of them stand out"
        logger.info(few if images < _FEWEST_IMAGES else "No training image stands out from the others")
        return
    names = "".join(f"\n  {path} ({score:.3g})" for path, score in worst)
    logger.warning("These training images stand out from the others; check whether they are normal:%s", names)


def saved_worst_fitting(saved: object) -> WorstFitting:
    """What a checkpoint says of the images that fit worst; nothing where it says nothing, or is damaged there."""
    pairs = saved if isinstance(saved, list) else []
    pairs = [pair for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]
    return [(path, score) for path, score in pairs if isinstance(path, str) and isinstance(score, float)]
