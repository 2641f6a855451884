"""Thresholds and normalization: anomalib's where validation has defects, otherwise from normal images alone."""

import logging
import math
from typing import Any

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import CatMetric, MaxMetric

from anomalib_cfa.hyperparameters import DEFAULT_FALSE_ALARM_RATE, check_hyperparameters, plain
from anomalib_cfa.metrics import reset_metrics

logger = logging.getLogger(__name__)

_PIXEL_STEP = 8  # every eighth pixel along each axis is enough: maps are smooth
_RANGE = 3  # normalized scores are 0 and 1 where a score is so many times as far from the threshold as the median
_EULER_MASCHERONI = 0.5772156649015329


class OneClassPostProcessor(PostProcessor):
    """Anomalib's post-processor, which also finds thresholds where only normal images are at hand.

    If there are defects among the validation images, thresholds and range are anomalib's, by the best F1. Otherwise the
    thresholds are such that a stated share of the normal images, and of their pixels, lies above them. The range is
    such that the normalized score is 1/2 at the threshold, as it always is, and 1/3 at the median. Where there are
    defects, but no masks of them, that of pixels comes from the normal images too: anomalib would take the image's,
    which may be on another scale.

    Args:
        false_alarm_rate: That share, above 0 and below 0.5.
        **kwargs: Anomalib's own arguments.

    Raises:
        ValueError: If the rate is out of its range.
    """

    def __init__(self, false_alarm_rate: float = DEFAULT_FALSE_ALARM_RATE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.false_alarm_rate = plain(false_alarm_rate)
        check_hyperparameters(false_alarm_rate=self.false_alarm_rate)
        self._image_scores, self._pixel_scores = CatMetric(), CatMetric()
        self._defects = MaxMetric()

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "false_alarm_rate")

    def update(self, predictions: InferenceBatch | ImageBatch) -> None:
        """Take in the scores, of shape (B,), and the maps, of shape (B, H, W), of normal images."""
        scores: Any = predictions.pred_score
        maps: Any = predictions.anomaly_map
        self._image_scores.update(scores)
        self._pixel_scores.update(maps[:, ::_PIXEL_STEP, ::_PIXEL_STEP].flatten())

    def finish(self, source: str) -> None:
        """Set thresholds and range from all images taken in, over all processes; nothing if none was.

        The log says that they are from ``source``.
        """
        if not self._image_scores.update_called:
            return
        self._set_threshold_and_range("pixel", self._pixel_scores)
        count = self._set_threshold_and_range("image", self._image_scores)
        if count == 0:
            return
        logger.info(
            "The thresholds come from %d %s, for false alarms at %g %% of normal images and of their pixels",
            count,
            source,
            100 * self.false_alarm_rate,
        )
        needed = math.ceil(1 / self.false_alarm_rate) - 1
        if count < needed:
            logger.warning(
                "%d normal images are too few to tell which score 1 of %d exceeds: the threshold is extrapolated, and "
                "more false alarms are likely. With %d images or more it would be read off",
                count,
                needed + 1,
                needed,
            )

    def _set_threshold_and_range(self, name: str, metric: CatMetric) -> int:
        """The same for images or pixels alone; how many scores there were."""
        scores = torch.as_tensor(metric.compute()).flatten()
        metric.reset()
        if not len(scores):
            return 0
        threshold = threshold_at_rate(scores, self.false_alarm_rate)
        half_range = _RANGE * (threshold - scores.median()).clamp(min=0)
        if self.enable_thresholding:
            getattr(self, f"_{name}_threshold").copy_(threshold)
        if self.enable_normalization:
            getattr(self, f"{name}_min").copy_(threshold - half_range)
            getattr(self, f"{name}_max").copy_(threshold + half_range)
            self._widen(name)
        return len(scores)

    def _widen(self, name: str) -> None:
        """Give an empty range some width: of one image, or of equal ones, no spread tells how far is far."""
        low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
        if low >= high:
            half_range = low.abs().clamp(min=1)
            low -= half_range
            high += half_range

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Take in a batch."""
        super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        if isinstance(outputs, ImageBatch) and outputs.gt_label is not None:
            self._defects.update(outputs.gt_label.float())
            normal = ~outputs.gt_label.bool()
            scores: Any = outputs.pred_score
            maps: Any = outputs.anomaly_map
            # Also where there is none: all processes gather their scores, or they would wait for each other.
            self.update(InferenceBatch(pred_score=scores[normal], anomaly_map=maps[normal]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set thresholds and range: anomalib's if there was a defect."""
        if self._defects.update_called and not self._defects.compute():
            self.finish("normal validation images")
        else:
            masked = self._pixel_threshold_metric.update_called or not self.enable_thresholding
            super().on_validation_epoch_end(trainer, pl_module)
            if self._defects.update_called and not len(torch.as_tensor(self._image_scores.compute()).flatten()):
                logger.warning("No validation image is normal: the thresholds are those of the defects alone")
            for name in ("image", "pixel"):
                self._widen(name)
            from_normal = not masked and self._pixel_scores.update_called
            if from_normal and self._set_threshold_and_range("pixel", self._pixel_scores):
                logger.info("No mask says where the defects are: the pixel threshold comes from normal images")
        reset_metrics(self)


def forget_thresholds(post_processor: nn.Module | None) -> None:
    """Let a post-processor of anomalib's be as one that has seen no image."""
    if isinstance(post_processor, PostProcessor):
        for name in ("_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max"):
            getattr(post_processor, name).fill_(torch.nan)


def threshold_at_rate(scores: Tensor, rate: float) -> Tensor:
    """The score that a further normal sample exceeds at a stated rate.

    Of n exchangeable samples, the next one exceeds the k-th smallest with a probability of (n + 1 - k) / (n + 1). Where
    n is too small for that, the upper end of a Gumbel distribution of the same mean and variance is taken, as an
    image's score is a maximum; never less than the largest score.

    Args:
        scores: Of normal samples, of shape (n,).
        rate: Above 0 and below 1.

    Returns:
        The threshold, a scalar.

    Example:
        >>> threshold_at_rate(torch.arange(199.0), 0.01)
        tensor(197.)
    """
    count = len(scores)
    rank = math.ceil((count + 1) * (1 - rate) - 1e-9)
    if rank <= count:
        return scores.kthvalue(rank).values
    scale = scores.std(correction=min(1, count - 1)) * math.sqrt(6) / math.pi
    extrapolated = scores.mean() - scale * (_EULER_MASCHERONI + math.log(-math.log1p(-rate)))
    return extrapolated.maximum(scores.max())
