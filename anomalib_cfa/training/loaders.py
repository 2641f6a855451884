"""Prepares the training images' loader: its order, and whether the images' features can be kept across epochs."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataset
from anomalib.data.datasets.base.video import AnomalibVideoDataset
from anomalib.data.transforms import ExportableCenterCrop, SquarePad
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import Transform

from anomalib_cfa.pre_processing import find_random_part
from anomalib_cfa.training.kept_features import FeatureStore, IndexedDataset
from anomalib_cfa.training.shards import shuffles_all

logger = logging.getLogger(__name__)

# Of 16 and 32 bits; conversion to RGB, as anomalib's reader does it, makes 255 of all above.
_CLIPPED_MODES = ("I", "F")
# What a rebuilt loader has of the data module's.
_KEPT = (
    "batch_size",
    "num_workers",
    "pin_memory",
    "drop_last",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


class TrainingLoader(DataLoader[Any]):
    """A loader that gives nothing until training starts, see :mod:`anomalib_cfa.training.features`.

    Lightning would start it in the first epoch's order even where a fit goes on.
    """

    starts_empty = True

    def __iter__(self) -> Any:  # torch's, or an empty one
        return iter(()) if self.starts_empty else super().__iter__()


def training_loader(
    loader: DataLoader[Any], trainer: Trainer, seed: int, store: FeatureStore | None
) -> DataLoader[Any]:
    """Rebuild a loader so that its order depends on the seed and the epoch alone, and kept features are used.

    torch's sampler for several processes serves a single one as well: any number of processes sees the same global
    batches, and a resumed run the order that it would have seen.

    Returns:
        A :class:`TrainingLoader` of the same images; the same one where it does not shuffle and nothing is kept.
    """
    overfits: float = getattr(trainer, "overfit_batches", 0)  # Lightning then wants its own order
    shuffles = shuffles_all(loader.sampler) and not overfits
    if loader.batch_size is None or (store is None and not shuffles):
        return loader
    dataset = loader.dataset if store is None else IndexedDataset(loader.dataset, store.signatures)  # type: ignore[arg-type]
    sampler = (
        DistributedSampler(dataset, trainer.world_size, trainer.global_rank, seed=seed, drop_last=loader.drop_last)
        if shuffles
        else loader.sampler
    )
    collate: Any = loader.collate_fn if store is None else dataset.collate_fn  # type: ignore[attr-defined]
    kept = {name: getattr(loader, name) for name in _KEPT}
    return TrainingLoader(dataset, sampler=sampler, collate_fn=collate, **kept)


def feature_store(
    loader: DataLoader[Any],
    pre_processor: nn.Module | None,
    budget: float,
    folder: Path,
    before: FeatureStore | None = None,
) -> FeatureStore | None:
    """A store for the features of a loader's images, or None, saying why, where they may differ between epochs.

    ``budget`` is in GiB; features beyond it go to ``folder``. ``before``, the store of a loader that this one replaces,
    stays if the images are as many and treated alike: it knows changed files.
    """
    reason = "feature_budget is 0" if budget == 0 else _may_differ(loader, pre_processor)
    if reason is not None:
        logger.info("The training images' features are not kept across epochs: %s", reason)
        return None
    count, treatment = len(loader.dataset), _treatment(loader, pre_processor)  # type: ignore[arg-type]
    if before is not None and (before.count, before.treatment) == (count, treatment):
        return before
    store = FeatureStore(count, int(budget * 2**30), folder)
    store.treatment = treatment
    return store


def renew_if_treated_otherwise(store: FeatureStore, loader: DataLoader[Any], pre_processor: nn.Module | None) -> None:
    """Forget kept features if the transforms that the images pass through have changed since."""
    treatment = _treatment(loader, pre_processor)
    if treatment != store.treatment:
        reason = _may_differ(loader, pre_processor)
        logger.info(
            "The training images' transforms have changed; their features are %skept", "not " if reason else "newly "
        )
        store.signatures.zero_()
        store.enabled = reason is None
        store.treatment = treatment


def _treatment(loader: DataLoader[Any], pre_processor: nn.Module | None) -> str:
    return repr((images_of(loader).augmentations, getattr(pre_processor, "transform", None)))


def images_of(loader: Any) -> Any:
    """The data set of a loader, without the wrapper that knows which features are kept."""
    return loader.dataset.dataset if isinstance(loader.dataset, IndexedDataset) else loader.dataset


def _may_differ(loader: DataLoader[Any], pre_processor: nn.Module | None) -> str | None:
    """Why the same image could lead to other features in another epoch, or None. No transform says so of itself."""
    dataset = images_of(loader)
    if not isinstance(dataset, AnomalibDataset) or type(dataset).__getitem__ is not AnomalibDataset.__getitem__:
        return f"{type(dataset).__name__} reads images in a way of its own"
    if not isinstance(loader.dataset, IndexedDataset) and loader.collate_fn != dataset.collate_fn:
        return "the data module has a collate function of its own"
    if pre_processor is not None and type(pre_processor) is not PreProcessor:
        return f"{type(pre_processor).__name__} is not anomalib's PreProcessor"
    for transform in (dataset.augmentations, pre_processor.transform if pre_processor is not None else None):
        if (unknown := find_random_part(transform)) is not None:
            return f"{unknown} is not known to treat an image alike each time"
    return None


def check_images(loader: DataLoader[Any], pre_processor: nn.Module | None) -> None:
    """Check the training images of an anomalib data set before any work starts.

    Raises:
        ValueError: If they are videos, there is none, one is anomalous or has more than 8 bits per channel, or they
            differ in size and nothing brings them to one size: anomalib's collate function would quietly resize them to
            each other.
    """
    dataset = loader.dataset
    if not isinstance(dataset, AnomalibDataset):
        return
    if isinstance(dataset, AnomalibVideoDataset):
        msg = f"The training data must be images, but {type(dataset).__name__} holds videos"
        raise ValueError(msg)  # noqa: TRY004 - as for the other data sets that cannot be trained on
    if len(dataset) == 0 or not dataset.has_normal:
        msg = f"The training data must hold normal images, but {type(dataset).__name__} found none"
        raise ValueError(msg)
    if dataset.has_anomalous:
        msg = f"The training data must hold normal images only, but {type(dataset).__name__} has anomalous ones"
        raise ValueError(msg)
    # What follows in the pre-processor comes too late, but for single images.
    transforms = [dataset.augmentations]
    if loader.batch_size == 1:
        transforms.append(getattr(pre_processor, "transform", None))
    _check_files(dataset.samples.image_path, of_any_size=any(map(_gives_one_size, transforms)))


def _check_files(paths: Iterable[str], *, of_any_size: bool) -> None:
    sizes: dict[tuple[int, int], str] = {}
    for path in paths:
        with Image.open(path) as image:
            sizes.setdefault(image.size, path)
            mode = image.mode
        if mode.startswith(_CLIPPED_MODES):
            msg = (
                "The training images must have 8 bits per channel, since anomalib's reader clips larger values, but "
                f"{path} is of Pillow's mode {mode!r}: convert the images to 8 bits, test images too"
            )
            raise ValueError(msg)
        if len(sizes) > 1 and not of_any_size:
            (first, first_path), (second, second_path) = sizes.items()
            msg = (
                "pre_processor must first resize the images to one size, since they differ: "
                f"{first_path} is {first[0]} x {first[1]}, {second_path} is {second[0]} x {second[1]}"
            )
            raise ValueError(msg)


def _gives_one_size(transform: Transform | None) -> bool:
    """Whether images of any size come out in one. A resize of the shorter side alone does so of square ones only."""
    if isinstance(transform, v2.Compose):
        kinds = [type(part) for part in transform.transforms]
        squared = SquarePad in kinds and v2.Resize in kinds[kinds.index(SquarePad) :]
        return squared or any(map(_gives_one_size, transform.transforms))
    if isinstance(transform, v2.Resize):
        return transform.size is not None and len(transform.size) == 2
    return isinstance(transform, v2.CenterCrop | v2.RandomCrop | v2.RandomResizedCrop | ExportableCenterCrop)
