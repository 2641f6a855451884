"""Anomalib's metrics of scores as they are, without a normalization that would clamp them."""

from types import SimpleNamespace
from typing import Any

from anomalib.data import Batch
from anomalib.metrics import AUPRO, AUROC
from torch import Tensor


class RawAUROC(AUROC):
    """AUROC of scores of any range.

    Torchmetrics takes scores beyond [0, 1] for logits, and puts each batch that has one through a sigmoid in float32.
    Mahalanobis distances become one there, and ties.
    """

    def update(self, batch: Batch, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Take in a batch."""
        scores, truth = self.fields
        in_order = {scores: _between_0_and_1(getattr(batch, scores)), truth: getattr(batch, truth)}
        super().update(SimpleNamespace(**in_order), *args, **kwargs)  # a batch would check the data type


class NormalFalsePositivesAUPRO(AUPRO):
    """AUPRO in which only normal images can give false positives.

    An annotation covers what was meant to be marked; around it, and elsewhere in the same image, a surface may be
    changed as well. What this leaves out of the usual AUPRO lies there.
    """

    def compute_pro(self, cca: Tensor, preds: Tensor) -> tuple[Tensor, Tensor]:
        """The curve, without the unmarked pixels of defective images.

        Args:
            cca: Numbers of the marked regions, 0 beside them, of shape (B, H, W) or (B, 1, H, W).
            preds: Anomaly maps of shape (B, H, W).

        Returns:
            The share of false positives and the regions' overlap with them.
        """
        cca = cca.reshape(preds.shape)
        of_normal_image = (cca == 0).flatten(1).all(dim=1)[:, None, None]
        counted = (cca > 0) | of_normal_image
        curve: tuple[Tensor, Tensor] = super().compute_pro(cca[counted], preds[counted])
        return curve


def _between_0_and_1(scores: Tensor) -> Tensor:
    """A rising function of scores, in float64: those of size 1e-6 to 1e6 that differ in float32 still do."""
    scores = scores.double()
    return 0.5 + 0.5 * scores / (1 + scores.abs())
