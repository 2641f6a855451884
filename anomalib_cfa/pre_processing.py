"""Images as they are read -> images as the backbone sees them."""

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from anomalib.data.transforms import ExportableCenterCrop, SquarePad
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.pre_processing import PreProcessor
from torch import nn
from torchvision.transforms import v2

from anomalib_cfa.features.backbones import Backbone, find_backbone
from anomalib_cfa.hyperparameters import check_hyperparameters, plain
from anomalib_cfa.resize import ExportableResize

logger = logging.getLogger(__name__)

_CONVERSIONS = (v2.ConvertImageDtype, v2.ToDtype, v2.ToImage, v2.ToPureTensor)
_KEEP_SHAPE = (*_CONVERSIONS, v2.Grayscale, v2.Identity, v2.Normalize, v2.RGB)
_SAME = 2e-3  # statistics are published with three digits


class SizedCenterCrop(ExportableCenterCrop):
    """Anomalib's crop, whose size an exported graph knows: torch 2.10 does not find it out, and fails."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop one input: the method that torchvision's transforms override."""
        cropped = super().transform(inpt, params)
        return cropped.reshape(*cropped.shape[:-2], *self.size) if torch.compiler.is_exporting() else cropped


_RESHAPE = (ExportableCenterCrop, ExportableResize, SizedCenterCrop, SquarePad, v2.CenterCrop, v2.Pad, v2.Resize)
_DETERMINISTIC_TRANSFORMS = {*_KEEP_SHAPE, *_RESHAPE, v2.LinearTransformation}


def exportable_transform(transform: v2.Transform | None) -> v2.Transform | None:
    """A copy of a transform that exports as it runs.

    Each ``Resize`` becomes an :class:`ExportableResize`, and each ``CenterCrop`` one that builds on anomalib's own
    exportable one, also inside of ``Compose``; all others stay.
    """
    if isinstance(transform, v2.CenterCrop | ExportableCenterCrop):
        return SizedCenterCrop(transform.size)
    # A subclass that resizes in its own way has no known weights.
    if isinstance(transform, v2.Resize) and type(transform).transform is v2.Resize.transform:
        return ExportableResize(transform.size, transform.interpolation, transform.max_size, transform.antialias)
    exported = copy.deepcopy(transform)
    if isinstance(exported, v2.Compose):
        exported.transforms = list(map(exportable_transform, exported.transforms))
    return exported


def make_exportable(pre_processor: nn.Module | None) -> None:
    """Make a pre-processor, in place, export the transform that it trains and tests with.

    Sets the ``export_transform`` that anomalib's ``PreProcessor``, or a subclass, runs outside of the trainer, from its
    ``transform``. Anomalib puts its own there whenever it builds a pre-processor, restores one from a checkpoint or
    changes its size. Leaves None and modules without these two attributes alone.
    """
    if pre_processor is None or not hasattr(pre_processor, "export_transform"):
        return
    transform = getattr(pre_processor, "transform", None)
    if transform is None or isinstance(transform, v2.Transform):
        pre_processor.export_transform = exportable_transform(transform)  # type: ignore[assignment]
        pre_processor.train(pre_processor.training)


def configure_pre_processor(
    image_size: Sequence[int] | int | None = None,
    center_crop_size: Sequence[int] | int | None = None,
    backbone: str | None = None,
) -> PreProcessor:
    """A resize, a centre crop if wanted, and the normalization that the backbone was trained with.

    Args:
        image_size: Height and width to resize to, in pixels, or one number for both. Default: 256 x 256, the paper's.
        center_crop_size: Height and width to crop to after that; the paper's is 224 x 224. Default: no crop.
        backbone: The backbone. Default: a ResNet, which takes ImageNet's mean and standard deviation, as most do.

    Returns:
        The pre-processor, made exportable.

    Raises:
        ValueError: If a size is not one or two positive integers, the crop is larger than the image, or there is no
            such backbone.
    """
    image_size, center_crop_size = map(plain, (image_size, center_crop_size))
    check_hyperparameters(image_size=image_size, center_crop_size=center_crop_size)
    height, width = _pair(256 if image_size is None else image_size)
    transforms: list[v2.Transform] = [v2.Resize((height, width), antialias=True)]
    if center_crop_size is not None:
        crop_height, crop_width = _pair(center_crop_size)
        if crop_height > height or crop_width > width:
            msg = f"center_crop_size must fit into image_size, but is {center_crop_size!r} for {[height, width]}"
            raise ValueError(msg)
        transforms.append(v2.CenterCrop((crop_height, crop_width)))
    found = find_backbone("resnet18" if backbone is None else backbone)
    transforms.append(v2.Normalize(mean=list(found.mean), std=list(found.std)))
    pre_processor = PreProcessor(v2.Compose(transforms))
    make_exportable(pre_processor)
    return pre_processor


def warn_of_other_statistics(pre_processor: nn.Module | None, backbone: Backbone) -> None:
    """Warn if a user's pre-processor does not normalize images as the backbone's weights were trained."""
    for part in extract_transforms_by_type(getattr(pre_processor, "transform", None), v2.Normalize):
        if not _agree(part, backbone):
            logger.warning(
                "The pre_processor normalizes with mean %s and std %s, but the weights of %s were trained with "
                "%s and %s",
                *(list(part.mean), list(part.std), backbone.name, list(backbone.mean), list(backbone.std)),
            )


def warn_of_late_resize(pre_processor: nn.Module | None) -> None:
    """Warn if a pre-processor's resize comes after what changes an image's shape.

    Anomalib's data modules apply the resize to each image that they read, before the whole pre-processor. Prediction
    from files and exports do not.

    Args:
        pre_processor: The user's own.
    """
    parts = list(_parts(getattr(pre_processor, "transform", None)))
    resizes = [place for place, part in enumerate(parts) if isinstance(part, v2.Resize)]
    before = [part for part in parts[: min(resizes, default=0)] if not isinstance(part, _KEEP_SHAPE)]
    if before:
        logger.warning(
            "The pre_processor should begin with its Resize, but has %s before it: anomalib's data modules resize "
            "images first, so that training and test would see other pixels than prediction and exports",
            ", ".join(type(part).__name__ for part in before),
        )


def visible_part(pre_processor: nn.Module | None) -> tuple[float, float, float, float] | None:
    """What is left of an image after a pre-processor: left, top, right, bottom, as parts of its width and height.

    None where that depends on the image's shape, or is not known.

    Example:
        >>> visible_part(configure_pre_processor(image_size=64, center_crop_size=(32, 64)))
        (0.0, 0.25, 1.0, 0.75)
    """
    parts = [part for part in _parts(getattr(pre_processor, "transform", None)) if not isinstance(part, _KEEP_SHAPE)]
    if not parts:
        return 0.0, 0.0, 1.0, 1.0
    resize, *others = parts
    if not isinstance(resize, v2.Resize) or len(resize.size or ()) != 2:
        return None
    sides = resize.size
    if [type(part) for part in others] in ([v2.CenterCrop], [ExportableCenterCrop]):
        sides = others[0].size
    elif others:
        return None
    top, left = ((1 - min(side / whole, 1)) / 2 for side, whole in zip(sides, resize.size, strict=True))
    return left, top, 1 - left, 1 - top


def _parts(transform: v2.Transform | None) -> Iterator[v2.Transform]:
    """The parts of nested compositions, in their order."""
    if isinstance(transform, v2.Compose):
        for part in transform.transforms:
            yield from _parts(part)
    elif transform is not None:
        yield transform


def _agree(normalize: v2.Normalize, backbone: Backbone) -> bool:
    ours, theirs = (*normalize.mean, *normalize.std), (*backbone.mean, *backbone.std)
    return len(ours) == len(theirs) and all(abs(a - b) < _SAME for a, b in zip(ours, theirs, strict=True))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def find_random_part(transform: v2.Transform | None) -> str | None:
    """Class name of the first part of a transform that is not known to give the same image each time, or None.

    Known are torchvision's and anomalib's own deterministic transforms and ``Compose`` of them, by their exact types: a
    subclass may do anything.

    Example:
        >>> find_random_part(v2.Compose([v2.Resize(64), v2.RandomRotation(90)]))
        'RandomRotation'
    """
    if transform is None or type(transform) in _DETERMINISTIC_TRANSFORMS:
        return None
    if type(transform) is v2.Compose:
        return next(filter(None, map(find_random_part, transform.transforms)), None)
    return type(transform).__name__
