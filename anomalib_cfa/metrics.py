"""AUROC of anomaly scores as they are, in whatever range."""

from anomalib.metrics import AnomalibMetric
from anomalib.metrics.auroc import _AUROC
from torch import Tensor


class _UnboundedAUROC(_AUROC):
    """Area under the ROC curve of scores in any range.

    Torchmetrics puts scores outside of [0, 1] through a sigmoid, batch by batch. In float32 that makes one value of all
    scores above 17, and orders the scores of two batches wrongly if only one of them is within [0, 1].
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in a batch.

        Args:
            preds: Anomaly scores of any shape.
            target: Labels of the same shape, 0 or 1.

        Raises:
            ValueError: If the shapes differ.
        """
        if preds.shape != target.shape:
            msg = f"preds must have the shape of target, {tuple(target.shape)}, but has {tuple(preds.shape)}"
            raise ValueError(msg)
        self.preds.append(preds.detach().flatten())
        self.target.append(target.detach().flatten().long())


class AUROC(AnomalibMetric, _UnboundedAUROC):  # type: ignore[misc]
    """Anomalib's AUROC, for scores in any range: validation's are not normalized yet.

    Args:
        fields: The batch's fields to compare, scores first.
        prefix: Put before the metric's name.
        strict: Whether a batch without these fields is an error.

    Example:
        >>> import torch
        >>> from anomalib.data import ImageBatch
        >>> auroc = AUROC(["pred_score", "gt_label"])
        >>> scores, labels = torch.tensor([20.0, 30.0]), torch.tensor([False, True])
        >>> auroc.update(ImageBatch(image=torch.rand(2, 3, 8, 8), pred_score=scores, gt_label=labels))
        >>> auroc.compute()
        tensor(1.)
    """
