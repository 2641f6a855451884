"""Predictions of the exported OpenVINO model, drawn beside the ground truth."""

import time
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from anomalib.data import NumpyImageItem
from anomalib.visualization.image.item_visualizer import visualize_image_item
from PIL import Image

from anomalib_cfa.inspect.predictors import OpenVINOPredictor
from anomalib_cfa.inspect.samples import Sample, find_samples


@dataclass(frozen=True)
class Finding:
    """The exported model's prediction for one image.

    Attributes:
        kind: Name of the image's folder: ``good``, or the kind of its defect.
        score: The normalized image score, in [0, 1]; above 0.5 an image is called defective.
        seconds: Time from file to prediction.
        picture: The picture drawn: the image, the true mask, the heat map, and the predicted outline.
    """

    kind: str
    score: float
    seconds: float
    picture: Path


def draw_heat_maps(model: Path, category: Path, folder: Path, per_kind: int = 2) -> list[Finding]:
    """Predict the first test images of every kind with anomalib's ``OpenVINOInferencer`` and draw them.

    Args:
        model: OpenVINO model, an ``.xml`` file.
        category: Folder of the category in MVTec AD's layout.
        folder: Where the pictures go.
        per_kind: Number of images of each kind.

    Returns:
        One finding for each image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    predictor = OpenVINOPredictor(model)
    kinds = groupby(find_samples(category), key=lambda sample: sample.kind)
    samples = [sample for _, of_kind in kinds for sample in islice(of_kind, per_kind)]
    return [_look(predictor, sample, folder, category.name) for sample in samples]


def _look(predictor: OpenVINOPredictor, sample: Sample, folder: Path, category: str) -> Finding:
    start = time.perf_counter()
    with Image.open(sample.path) as file:
        image = file.convert("RGB")
    prediction = predictor.predict(image)
    seconds = time.perf_counter() - start
    drawn = visualize_image_item(
        NumpyImageItem(
            image=np.asarray(image),
            gt_mask=sample.read_mask(prediction.anomaly_map.shape, predictor.view),
            anomaly_map=prediction.anomaly_map,
            pred_mask=prediction.mask,
        ),
        fields=["image", "gt_mask"],
        overlay_fields=[("image", ["anomaly_map"]), ("image", ["pred_mask"])],
    )
    picture = folder / f"{category}_{sample.kind}_{sample.path.stem}.png"
    if drawn is not None:  # it is never None: there are fields to draw
        drawn.save(picture)
    return Finding(sample.kind, prediction.score, seconds, picture)
