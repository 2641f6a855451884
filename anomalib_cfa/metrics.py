"""AUROC of anomaly scores as they are, in whatever range; and metrics that forget."""

from collections.abc import Sequence
from typing import Any

from anomalib import metrics
from torch import nn
from torchmetrics import Metric


class AUROC(metrics.AUROC):
    """Anomalib's AUROC, for scores in any range: validation's are not normalized yet.

    By default torchmetrics puts scores outside of [0, 1] through a sigmoid, batch by batch. In float32 that makes one
    value of all scores above 17, and orders the scores of two batches wrongly if only one of them is within [0, 1].

    Args:
        fields: The batch's fields to compare, scores first.
        prefix: Put before the metric's name.
        strict: Whether a batch without these fields is an error.
        **kwargs: Those of torchmetrics.

    Example:
        >>> import torch
        >>> from anomalib.data import ImageBatch
        >>> auroc = AUROC(["pred_score", "gt_label"])
        >>> scores, labels = torch.tensor([20.0, 30.0]), torch.tensor([False, True])
        >>> auroc.update(ImageBatch(image=torch.rand(2, 3, 8, 8), pred_score=scores, gt_label=labels))
        >>> auroc.compute()
        tensor(1.)
    """

    def __init__(self, fields: Sequence[str], prefix: str = "", strict: bool = True, **kwargs: Any) -> None:
        super().__init__(fields, prefix, strict, normalization=None, **kwargs)


def reset_metrics(*parts: nn.Module | None) -> None:
    """Let all metrics in these parts forget the images that they have taken in."""
    for part in parts:
        for module in () if part is None else part.modules():
            if isinstance(module, Metric):
                module.reset()
