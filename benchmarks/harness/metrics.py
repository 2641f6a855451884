"""Anomalib's metrics on raw scores, without a normalization that would clamp them."""

from types import SimpleNamespace
from typing import Any

from anomalib.data import Batch
from anomalib.metrics import AUPRO, AUROC, Evaluator
from torch import Tensor

METRICS = {"image_RawAUROC": "image AUROC", "pixel_RawAUROC": "pixel AUROC", "pixel_AUPRO": "AUPRO"}
"""Those of :func:`raw_evaluator`, by the names of anomalib's test."""


class RawAUROC(AUROC):
    """AUROC of scores of any range.

    Torchmetrics takes scores beyond [0, 1] for logits, and puts each batch that has one through a sigmoid in float32.
    Mahalanobis distances all become 1 there, and so are tied.
    """

    def update(self, batch: Batch, *args: Any, **kwargs: Any) -> None:
        """Take in a batch."""
        scores, truth = self.fields
        in_order = {scores: _between_0_and_1(getattr(batch, scores)), truth: getattr(batch, truth)}
        super().update(SimpleNamespace(**in_order), *args, **kwargs)  # a batch would check the data type


def raw_evaluator(*, has_masks: bool) -> Evaluator:
    """Image AUROC and, where the set has masks, pixel AUROC and AUPRO."""
    metrics: list[Any] = [RawAUROC(["pred_score", "gt_label"], "image_")]
    if has_masks:
        pixels = ["anomaly_map", "gt_mask"]
        metrics += [RawAUROC(pixels, "pixel_"), AUPRO(pixels, "pixel_")]
    return Evaluator(test_metrics=metrics)


def _between_0_and_1(scores: Tensor) -> Tensor:
    """A strictly increasing function, in float64: scores of size 1e-6 to 1e6 that differ in float32 still do."""
    scores = scores.double()
    return 0.5 + 0.5 * scores / (1 + scores.abs())
