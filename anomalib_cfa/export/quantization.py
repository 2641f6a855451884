"""INT8 compression of an exported model with NNCF: the backbone alone, by the images that it was trained on."""

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from statistics import mean
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset, ImageBatch
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from anomalib.deploy.export import CompressionType
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from openvino import Model
from torch import nn
from torchmetrics import Metric
from torchvision.transforms.v2 import Transform
from torchvision.transforms.v2 import functional as v2_functional

from anomalib_cfa.export.openvino import Node, operations
from anomalib_cfa.metrics import AUROC

_CALIBRATION_IMAGES = 300  # what NNCF takes
_VALIDATION_IMAGES = 200
_IMAGE_FIELDS, _PIXEL_FIELDS = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]
_PIXEL_STRIDE = 4  # the map is smooth, and all of its pixels would take minutes to rank


def check_images(compression_type: CompressionType | None, datamodule: AnomalibDataModule | None) -> None:
    """Raise a ValueError if a compression's data module is missing or too small."""
    if compression_type not in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ}:
        return
    if datamodule is None:
        msg = f"datamodule must be given for compression_type {compression_type!r}, which calibrates on its images"
        raise ValueError(msg)
    if not hasattr(datamodule, "train_data"):
        datamodule.setup("fit")
    # Half of them judge, and half of these with a defect.
    fewest = 4 if compression_type == CompressionType.INT8_ACQ else 1
    if len(datamodule.train_data) < fewest:
        msg = (
            f"datamodule must hold at least {fewest} training images for compression_type {compression_type!r}, but "
            f"holds {len(datamodule.train_data)}"
        )
        raise ValueError(msg)


def compress(
    model: Model,
    compression_type: CompressionType,
    kept: Sequence[Node],
    datamodule: AnomalibDataModule | None = None,
    pre_processor: nn.Module | None = None,
    metric: Metric | None = None,
    max_drop: float = 0.01,
    seed: int = 0,
) -> Model:
    """Compress an OpenVINO model to INT8, but for the operations that are ``kept`` in floating point.

    The data module gives the training images to calibrate on, and others of them, half with synthetic defects by the
    seed, for ``INT8_ACQ`` to judge by; its test images are not looked at. The pre-processor, the model's, brings masks
    to the map's size. Other arguments are those of :meth:`~anomalib_cfa.export.mixin.CfaExport.to_openvino`.
    """
    import nncf  # noqa: PLC0415 - optional

    names = [operation.get_friendly_name() for operation in kept]
    if compression_type == CompressionType.INT8:
        return nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(names=names, validate=False))

    assert datamodule is not None
    shape = model.input(0).get_partial_shape()
    normal = copy.copy(datamodule.train_data)
    normal.augmentations = None
    transformer = any(
        operation.get_type_name() in {"Softmax", "ScaledDotProductAttention"} for operation in model.get_ops()
    )
    # On training images of the magnetic tiles scores were off by 13 % on average with all of the backbone in INT8, by
    # 1.7 % without its first convolution, and by 1.2 % with the slower correction of biases, too.
    convolutions = [node.get_friendly_name() for node in operations(model) if "Conv" in node.get_type_name()]
    names += [name for name in convolutions if name not in names][:1]
    options = {
        "ignored_scope": nncf.IgnoredScope(names=names, validate=False),
        "model_type": nncf.ModelType.TRANSFORMER if transformer else None,
        "fast_bias_correction": False,
    }
    if compression_type == CompressionType.INT8_PTQ:
        images = _Images(normal.subsample(_spread(len(normal), _CALIBRATION_IMAGES)), shape)
        return nncf.quantize(model, nncf.Dataset(images, _pixels), subset_size=len(images), **options)

    judged = _spread(len(normal), min(_VALIDATION_IMAGES, len(normal) // 2))
    rest = sorted(set(range(len(normal))) - set(judged))
    calibration = _Images(normal.subsample([rest[i] for i in _spread(len(rest), _CALIBRATION_IMAGES)]), shape)
    transform = getattr(pre_processor, "transform", None)
    validation = _Images(_with_defects(normal.subsample(judged), seed), shape, transform)
    return nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(calibration, _pixels),
        nncf.Dataset(validation),
        lambda compiled, batches: _evaluate(compiled, batches, metric),
        max_drop=max_drop,
        subset_size=len(calibration),
        **options,
    )


class _Images:
    """Images of a data set as an exported model takes them, in batches of the size that it takes."""

    def __init__(self, dataset: AnomalibDataset, shape: Any, transform: Transform | None = None) -> None:
        self.dataset = dataset
        self.shape = shape
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[ImageBatch]:
        batch, _, *size = self.shape
        for index in range(len(self.dataset)):
            item: Any = self.dataset[index]
            image, mask = item.image, item.gt_mask
            if mask is not None and self.transform is not None:
                _, mask = self.transform(image, mask)
            # Any size goes in, and the graph resizes it as it does in use, unless it was exported for one size.
            if size[0].is_static and size[1].is_static:
                image = v2_functional.resize(image, [side.get_length() for side in size], antialias=True)
            count = batch.get_length() if batch.is_static else 1
            yield ImageBatch(
                image=image.expand(count, -1, -1, -1).contiguous().float(),
                gt_label=item.gt_label.reshape(1),
                gt_mask=None if mask is None else mask.reshape(1, *mask.shape[-2:]),
            )


def _pixels(batch: ImageBatch) -> NDArray[np.float32]:
    image: Any = batch.image
    pixels: NDArray[np.float32] = image.numpy()
    return pixels


def _spread(length: int, count: int) -> list[int]:
    """Indices of count out of length items, or of all, evenly spread: data sets are ordered."""
    return sorted({int(index) for index in np.linspace(0, length - 1, min(count, length))})


def _with_defects(normal: AnomalibDataset, seed: int) -> SyntheticAnomalyDataset:
    with isolate_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - anomalib and pandas draw from it
        random.seed(seed)
        return SyntheticAnomalyDataset.from_dataset(normal)


def _evaluate(compiled: Any, batches: Iterable[ImageBatch], metric: Metric | None) -> float:
    """Evaluate a compiled model by a metric, or by the mean of image and pixel AUROC."""
    metrics = [metric] if metric is not None else [AUROC(_IMAGE_FIELDS), AUROC(_PIXEL_FIELDS, strict=False)]
    stride = 1 if metric is not None else _PIXEL_STRIDE
    for each in metrics:
        each.reset()
    masked = False
    for batch in batches:
        outputs = compiled(_pixels(batch)).items()
        # Of a batch of copies the first.
        found: Any = {next(iter(key.names)): torch.from_numpy(value[:1].copy()) for key, value in outputs}
        found["anomaly_map"] = found["anomaly_map"][..., ::stride, ::stride]
        image: Any = batch.image
        mask = batch.gt_mask
        if mask is not None:
            masked, mask = True, mask[..., ::stride, ::stride]
        judged = ImageBatch(image=image[:1], gt_label=batch.gt_label, gt_mask=mask, **found)
        for each in metrics:
            each.update(judged)
    return mean(float(each.compute()) for each in (metrics if masked else metrics[:1]))
