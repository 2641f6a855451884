"""INT8 compression of an exported model with NNCF: the backbone alone, by the images that it was trained on."""

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset, ImageBatch
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from anomalib.deploy.export import CompressionType
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2 import Transform
from torchvision.transforms.v2 import functional as v2_functional

from anomalib_cfa.export.openvino import operations

_CALIBRATION_IMAGES = 300  # what NNCF takes
_VALIDATION_IMAGES = 200
_PIXEL_STRIDE = 4  # the map is smooth, and all of its pixels would take minutes to rank


def check_compression(
    compression_type: CompressionType | None, datamodule: AnomalibDataModule | None, max_drop: float
) -> None:
    """Check what a compression needs, before any work starts.

    Raises:
        ValueError: If the data module is missing or has too few images, or ``max_drop`` is out of its range.
    """
    if not 0 <= max_drop <= 1:
        msg = f"max_drop must be between 0 and 1, but is {max_drop!r}"
        raise ValueError(msg)
    if compression_type not in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ}:
        return
    if datamodule is None:
        msg = f"datamodule must be given for compression_type {compression_type!r}, which calibrates on its images"
        raise ValueError(msg)
    if not hasattr(datamodule, "train_data"):
        datamodule.setup("fit")
    fewest = 2 if compression_type == CompressionType.INT8_ACQ else 1  # one to calibrate on, and one to judge by
    if len(datamodule.train_data) < fewest:
        msg = (
            f"datamodule must hold at least {fewest} training images for compression_type {compression_type!r}, but "
            f"holds {len(datamodule.train_data)}"
        )
        raise ValueError(msg)


def compress(
    model: Any,  # noqa: ANN401 - OpenVINO is optional
    compression_type: CompressionType,
    kept: Sequence[Any],
    datamodule: AnomalibDataModule | None = None,
    pre_processor: nn.Module | None = None,
    metric: Metric | None = None,
    max_drop: float = 0.01,
    seed: int = 0,
) -> Any:  # noqa: ANN401
    """Compress an OpenVINO model to INT8.

    Args:
        model: The OpenVINO model.
        compression_type: ``INT8`` (weights alone), ``INT8_PTQ`` or ``INT8_ACQ``.
        kept: Operations of the model that stay in floating point.
        datamodule: Gives the training images for calibration, and others of them, half with synthetic defects, for
            ``INT8_ACQ`` to judge by. Its test images are not looked at.
        pre_processor: The model's, which brings masks to the map's size.
        metric: What ``INT8_ACQ`` must keep; higher is better. Default: the mean of image and pixel AUROC.
        max_drop: How much of the metric ``INT8_ACQ`` may lose.
        seed: Governs the synthetic defects.

    Returns:
        The compressed model.
    """
    import nncf  # noqa: PLC0415 - optional

    names = [operation.get_friendly_name() for operation in kept]
    if compression_type == CompressionType.INT8:
        return nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(names=names, validate=False))

    assert datamodule is not None
    shape = model.input(0).get_partial_shape()
    normal = _without_augmentations(datamodule.train_data)
    transformer = any(
        operation.get_type_name() in {"Softmax", "ScaledDotProductAttention"} for operation in model.get_ops()
    )
    # On training images of the magnetic tiles scores were off by 13 % on average with all of the backbone in INT8, by
    # 1.7 % without its first convolution, and by 1.2 % with the slower correction of biases, too.
    names += _first_convolution(model, names)
    options = {
        "ignored_scope": nncf.IgnoredScope(names=names, validate=False),
        "model_type": nncf.ModelType.TRANSFORMER if transformer else None,
        "fast_bias_correction": False,
    }
    if compression_type == CompressionType.INT8_PTQ:
        images = _Images(normal.subsample(_spread(len(normal), _CALIBRATION_IMAGES)), shape)
        return nncf.quantize(model, nncf.Dataset(images, _image), subset_size=len(images), **options)

    judged = _spread(len(normal), min(_VALIDATION_IMAGES, len(normal) // 2))
    rest = sorted(set(range(len(normal))) - set(judged))
    calibration = _Images(normal.subsample([rest[i] for i in _spread(len(rest), _CALIBRATION_IMAGES)]), shape)
    transform = getattr(pre_processor, "transform", None)
    validation = _Images(_with_defects(normal.subsample(judged), seed), shape, transform)
    return nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(calibration, _image),
        nncf.Dataset(validation),
        lambda compiled, examples: _evaluate(compiled, examples, metric),
        max_drop=max_drop,
        subset_size=len(calibration),
        **options,
    )


def _first_convolution(model: Any, kept: Sequence[str]) -> list[str]:  # noqa: ANN401
    """The name of the backbone's first convolution, if it has one."""
    found: list[str] = [node.get_friendly_name() for node in operations(model) if "Conv" in node.get_type_name()]
    return [name for name in found if name not in kept][:1]


@dataclass(frozen=True)
class _Example:
    image: NDArray[np.float32]
    label: Tensor
    mask: Tensor | None


class _Images:
    """Images of a data set, one at a time, as an exported model takes them."""

    def __init__(self, dataset: AnomalibDataset, shape: Any, transform: Transform | None = None) -> None:  # noqa: ANN401
        self.dataset = dataset
        self.shape = shape
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[_Example]:
        batch, _, *size = self.shape
        for index in range(len(self.dataset)):
            item: Any = self.dataset[index]
            image, mask = item.image, item.gt_mask
            if mask is not None and self.transform is not None:
                _, mask = self.transform(image, mask)
            # Any size goes in, and the graph resizes it as it does in use, unless it was exported for one size.
            if size[0].is_static and size[1].is_static:
                image = v2_functional.resize(image, [side.get_length() for side in size], antialias=True)
            images = image[None].expand(batch.get_length() if batch.is_static else 1, -1, -1, -1)
            yield _Example(np.ascontiguousarray(images.numpy(), dtype=np.float32), item.gt_label, mask)


def _image(example: _Example) -> NDArray[np.float32]:
    return example.image


def _spread(length: int, count: int) -> list[int]:
    """Indices of count out of length items, or of all, evenly spread: data sets are ordered."""
    return sorted({int(index) for index in np.linspace(0, length - 1, min(count, length))})


def _without_augmentations(dataset: AnomalibDataset) -> AnomalibDataset:
    plain = copy.copy(dataset)
    plain.augmentations = None
    return plain


def _with_defects(normal: AnomalibDataset, seed: int) -> SyntheticAnomalyDataset:
    with isolate_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - anomalib and pandas draw from it
        random.seed(seed)
        return SyntheticAnomalyDataset.from_dataset(normal)


def _evaluate(compiled: Any, examples: Iterable[_Example], metric: Metric | None) -> float:  # noqa: ANN401
    """Evaluate a compiled model by a metric, or by the mean of image and pixel AUROC."""
    scores, labels, pixel_scores, pixel_labels = [], [], [], []
    if metric is not None:
        metric.reset()
    for example in examples:
        output = {
            next(iter(key.names)): torch.from_numpy(value[:1].copy()) for key, value in compiled(example.image).items()
        }
        if metric is not None:
            metric.update(_batch(example, output))
            continue
        scores.append(output["pred_score"].flatten())
        labels.append(example.label.reshape(1))
        if example.mask is not None:
            pixel_scores.append(output["anomaly_map"][..., ::_PIXEL_STRIDE, ::_PIXEL_STRIDE].flatten())
            pixel_labels.append((example.mask[..., ::_PIXEL_STRIDE, ::_PIXEL_STRIDE] > 0).flatten())
    if metric is not None:
        return float(metric.compute())
    aurocs = [binary_auroc(torch.cat(scores), torch.cat(labels))]
    if pixel_scores:
        aurocs.append(binary_auroc(torch.cat(pixel_scores), torch.cat(pixel_labels).long()))
    return float(torch.stack(aurocs).mean())


def _batch(example: _Example, output: dict[str, Tensor]) -> ImageBatch:
    """What anomalib's metrics take."""
    predictions: dict[str, Any] = dict(output)
    return ImageBatch(
        image=torch.from_numpy(example.image[:1]),
        gt_label=example.label.reshape(1),
        gt_mask=None if example.mask is None else example.mask.reshape(1, *example.mask.shape[-2:]),
        **predictions,
    )
