"""What is gathered over all images: the model's thresholds, and how the pixels score."""

import numpy as np
from numpy.typing import NDArray

_PIXEL_THRESHOLDS = np.linspace(0, 1, 1001).astype(np.float32)


class Threshold:
    """Infers a model's threshold from its verdicts: anomalib's default, 0.5, or else one that agrees with them."""

    def __init__(self) -> None:
        self._negative, self._positive = -np.inf, np.inf  # highest score that is negative, and lowest positive one

    def update(self, scores: NDArray[np.float32], verdicts: NDArray[np.bool_]) -> None:
        """Take in scores and what the model made of them, both of any one shape."""
        self._negative = max(self._negative, scores.max(where=~verdicts, initial=-np.inf))
        self._positive = min(self._positive, scores.min(where=verdicts, initial=np.inf))

    @property
    def value(self) -> float:
        """A threshold for which the positive scores are exactly those above it."""
        if self._negative <= 0.5 < self._positive:
            return 0.5
        lowest, highest = (float(np.clip(score, 0, 1)) for score in (self._negative, self._positive))
        # The shortest decimal that tells them apart. Where they are neighbours, the lower one itself may have to.
        candidates = [*(round((lowest + highest) / 2, places) for places in range(3, 10)), lowest]
        fitting = (value for value in candidates if self._negative <= _effective(value) < self._positive)
        return next(fitting, candidates[0])


def _effective(threshold: float) -> float:
    """The threshold as anomalib computes it, in float32 from its sensitivity; so does the page."""
    return float(np.float32(1) - np.float32(1 - threshold))


class PixelCounts:
    """Counts pixels between thresholds a thousandth apart, the normal, the defective and the unlabelled."""

    def __init__(self) -> None:
        self.counts = {
            kind: np.zeros(len(_PIXEL_THRESHOLDS) + 1, dtype=np.int64) for kind in ("normal", "defective", "unknown")
        }

    def update(self, anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_] | None) -> None:
        """Take in an image: its map, and its true mask of the same shape if there is one."""
        # Bin k counts the pixels that are above k thresholds.
        places = np.searchsorted(_PIXEL_THRESHOLDS, anomaly_map.ravel(), side="left")
        size = len(_PIXEL_THRESHOLDS) + 1
        if mask is None:
            self.counts["unknown"] += np.bincount(places, minlength=size)
            return
        defective = np.bincount(places[mask.ravel()], minlength=size)
        self.counts["defective"] += defective
        self.counts["normal"] += np.bincount(places, minlength=size) - defective
