"""Checks of the trainer, the batches and the model, before any long work starts."""

import logging
from collections.abc import Sequence

from anomalib.data import AnomalibDataModule
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from anomalib_cfa.training.kept_features import IndexedBatch

logger = logging.getLogger(__name__)

_REFUSED: dict[type[Callback], str] = {
    BackboneFinetuning: "it trains the backbone, which is frozen",
    BatchSizeFinder: "it takes steps before the memory bank is built",
    LearningRateFinder: "it takes steps before the memory bank is built",
    ModelPruning: "it prunes the backbone, which is frozen",
    StochasticWeightAveraging: "it resets the batch normalization of the backbone, which is frozen",
    WeightAveraging: "it copies the model before the memory bank is built",
}
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


def check_trainer(trainer: Trainer) -> None:
    """Raise a ValueError if a trainer's argument cannot be followed, naming it, what it must be, and what it was."""
    if trainer.precision not in _PRECISIONS:
        wanted = ", ".join(map(repr, _PRECISIONS))
        msg = f"precision must be one of {wanted}, as anomalib's images are of float32, but is {trainer.precision!r}"
        raise ValueError(msg)
    if isinstance(trainer.accelerator, MPSAccelerator):
        msg = "accelerator must not be 'mps', which has no float64; on the command line: --trainer.accelerator cpu"
        raise ValueError(msg)  # noqa: TRY004 - as for the other options
    if trainer.training and trainer.limit_train_batches == 0:
        msg = "limit_train_batches must leave at least one batch to train on, but is 0"
        raise ValueError(msg)
    if trainer.training and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        logger.warning(
            "Of what the processes of this strategy learn, only weights and thresholds come back: training_images and "
            "worst_fitting stay empty here, but are in the log and in checkpoints. Take strategy='ddp' to have them"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's own type lacks it
        for kind, reason in _REFUSED.items():
            if trainer.training and isinstance(callback, kind):
                msg = f"callbacks must not have {type(callback).__name__}: {reason}"
                raise ValueError(msg)


def check_batch(batch: object) -> None:
    """Check that a batch holds images.

    Raises:
        TypeError: If it is none of anomalib's.
        ValueError: If what it holds is not of the shape (B, C, H, W).
    """
    if isinstance(batch, IndexedBatch):
        return
    image = getattr(batch, "image", None)
    if not isinstance(image, Tensor):
        msg = (
            f"Batches must be of anomalib's kind, but one is of type {type(batch).__name__}: let the data set give "
            "ImageItem, and take ImageBatch.collate as the loader's collate_fn"
        )
        raise TypeError(msg)
    if image.ndim != 4:
        msg = f"Batches must hold images of shape (B, 3, H, W), but {type(batch).__name__} has {tuple(image.shape)}"
        raise ValueError(msg)


def do_without_validation(trainer: Trainer) -> int | float:
    """Skip validation where the data module has no images for it; anomalib would fail asking for them.

    Returns the trainer's ``limit_val_batches``, to be put back when the run ends.

    Raises:
        ValueError: If nothing but a validation was asked for.
    """
    limit, datamodule = trainer.limit_val_batches, getattr(trainer, "datamodule", None)
    if isinstance(datamodule, AnomalibDataModule) and not hasattr(datamodule, "val_data"):
        if trainer.state.fn == TrainerFn.VALIDATING:
            mode = str(datamodule.val_split_mode.value)
            msg = f"datamodule must have images to validate on, but has none: its val_split_mode is {mode!r}"
            raise ValueError(msg)
        trainer.limit_val_batches = 0
    return limit


def check_epochs_left(trainer: Trainer) -> None:
    """Raise a RuntimeError if a trainer would not train a new model, since it has run all its epochs with another."""
    if trainer.fit_loop.skip and trainer.current_epoch > 0:
        msg = (
            f"The trainer has run its {trainer.current_epoch} epochs with another model, and would not train this one: "
            "take a new Engine for each fit"
        )
        raise RuntimeError(msg)


def warn_of_other_images(images: Sequence[str], of_bank: Sequence[str]) -> None:
    """Warn if a fit goes on with other images than those of the memory bank, by their paths where these are known."""
    if images and of_bank and not set(images) & set(of_bank):
        logger.warning(
            "None of the training images is one of those that the memory bank was made of, such as %s: what is normal "
            "is still what those show, and neither thresholds nor odd images are found by these. For a model of the "
            "new images, fit a new one, or call clear_memory_bank() first",
            of_bank[0],
        )


def warn_without_threshold(post_processor: nn.Module | None) -> None:
    """Warn if images and pixels will be labelled although no threshold was ever chosen."""
    if not isinstance(post_processor, PostProcessor) or not post_processor.enable_thresholding:
        return
    if post_processor.image_threshold.isnan():
        logger.warning(
            "The model has no threshold and no range to normalize scores with, as neither a validation was run nor a "
            "whole epoch of two training images or more: scores are as they are, and labels mean nothing. Run "
            "engine.validate, or fit with validation images"
        )
