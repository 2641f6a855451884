"""Predictions of the exported OpenVINO model, drawn beside the ground truth."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from anomalib.data import NumpyImageItem
from anomalib.data.utils import read_mask
from anomalib.deploy import OpenVINOInferencer
from anomalib.visualization.image.item_visualizer import visualize_image_item


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
    model, category, folder = model.resolve(), category.resolve(), folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with _working_directory(folder.parent):  # the inferencer leaves its cache in the working directory
        inferencer = OpenVINOInferencer(path=model, device="CPU")
    kinds = sorted(path.name for path in (category / "test").iterdir() if path.is_dir())
    images = [path for kind in kinds for path in sorted((category / "test" / kind).glob("*.png"))[:per_kind]]
    return [_look(inferencer, image, category, folder) for image in images]


def _look(inferencer: OpenVINOInferencer, image: Path, category: Path, folder: Path) -> Finding:
    start = time.perf_counter()
    prediction = inferencer.predict(image)
    seconds = time.perf_counter() - start
    names = ("image", "anomaly_map", "pred_mask", "pred_score")
    seen = {name: np.squeeze(np.asarray(getattr(prediction, name))) for name in names}  # a batch of one
    kind = image.parent.name
    truth = category / "ground_truth" / kind / f"{image.stem}_mask.png"
    drawn = visualize_image_item(
        NumpyImageItem(
            image=seen["image"],
            gt_mask=np.asarray(read_mask(truth)) if truth.is_file() else np.zeros(seen["image"].shape[-2:], bool),
            anomaly_map=seen["anomaly_map"],
            pred_mask=seen["pred_mask"],
        ),
        fields=["image", "gt_mask"],
        overlay_fields=[("image", ["anomaly_map"]), ("image", ["pred_mask"])],
    )
    picture = folder / f"{category.name}_{kind}_{image.stem}.png"
    if drawn is not None:  # it is never None: there are fields to draw
        drawn.save(picture)
    return Finding(kind, float(seen["pred_score"]), seconds, picture)


@contextmanager
def _working_directory(path: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
