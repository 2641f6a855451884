"""What happens before the first step: the descriptor's start, the memory bank, and the score's first calibration."""

import logging
from functools import partial

import torch
from lightning.pytorch.strategies import Strategy

from anomalib_cfa.hyperparameters import check_neighbors
from anomalib_cfa.torch_model import CfaModel
from anomalib_cfa.training.features import TrainingFeatures
from anomalib_cfa.whitening import PatchStatistics

logger = logging.getLogger(__name__)

_IMAGES_FOR_STATISTICS = 256
_IMAGES_FOR_CALIBRATION = 64


@torch.no_grad()
def build_memory_bank(
    model: CfaModel, features: TrainingFeatures, strategy: Strategy, *, whitening: float | None
) -> None:
    """Start the descriptor, and build the memory bank with it in one pass over the normal training images.

    All processes end with the same, bit for bit.

    Args:
        model: The network, its backbone's weights loaded.
        features: Of the training images.
        strategy: Knows the processes.
        whitening: How far the descriptor's start evens out variances, from 0 to 1; None for a random start.

    Raises:
        ValueError: If the bank would have fewer than K + J centres, or the images differ in size.
    """
    total = partial(strategy.reduce, reduce_op="sum")
    if whitening is not None:
        statistics = PatchStatistics()
        for pyramid in features.pyramids("Reading patch features", most=_IMAGES_FOR_STATISTICS):
            _check_patches(model, pyramid[0].shape[-2] * pyramid[0].shape[-1])
            statistics.update(pyramid)
        statistics.merge(total)
        mean, covariance = strategy.broadcast(statistics.moments())
        model.descriptor.start_whitened(mean, covariance, model.seed, whitening)

    processes, process = getattr(strategy, "world_size", 1), getattr(strategy, "global_rank", 0)
    builder = model.bank_builder(strategy.broadcast, processes, process)
    for pyramid in features.pyramids("Building the memory bank"):
        for block in model.blocks(pyramid):
            descriptors = model.describe(block).flatten(1, 2)
            _check_patches(model, descriptors.shape[1])
            builder.update(descriptors)
    builder.merge(total)
    # K-means need not round alike on all machines.
    model.assign_bank(strategy.broadcast(builder.centers()).to(model.descriptor.weight.device))

    for pyramid in features.pyramids("Calibrating the score", most=_IMAGES_FOR_CALIBRATION):
        for block in model.blocks(pyramid):
            squared, indices = model.memory_bank.nearest(model.describe(block), k=1)
            model.calibration.update(squared.sqrt(), indices)
    model.calibration.finish(total)
    logger.info("Built the memory bank: %d centres from %d images", len(model.memory_bank.centers), builder.count)


def _check_patches(model: CfaModel, patches: int) -> None:
    check_neighbors(int(patches / model.gamma_c), model.num_nearest_neighbors, model.num_hard_negative_features)
