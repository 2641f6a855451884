"""A model's predictions of a folder -> everything that the page shows."""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from anomalib_cfa.inspect import pictures
from anomalib_cfa.inspect.page import PageFolder
from anomalib_cfa.inspect.predictors import Prediction, Predictor, load_predictor
from anomalib_cfa.inspect.reasons import Reason
from anomalib_cfa.inspect.samples import Sample, find_samples
from anomalib_cfa.inspect.statistics import PixelCounts, Threshold

_SMALL_MAP = 64  # longer side of a thumbnail's heat map, in pixels


@dataclass
class Inspection:
    """The outcome of :func:`inspect_folder`.

    Attributes:
        page: The page.
        images: How many images it shows.
        unreadable: Names of the files that could not be processed, with the reasons.
        predicting: Seconds spent on reading and predicting the images.
        writing: Seconds spent on pictures and on the page.
    """

    page: Path
    images: int
    unreadable: dict[str, str]
    predicting: float = 0.0
    writing: float = 0.0


def inspect_folder(model: Path, folder: Path, page: Path, embed: bool = False, device: str | None = None) -> Inspection:
    """Predict all images of a folder, and write the page on which to judge the predictions.

    Args:
        model: A checkpoint, or an exported model.
        folder: Images, or a category in MVTec AD's layout, see :func:`~anomalib_cfa.inspect.samples.find_samples`.
        page: File to write. Unless all is embedded, pictures go to a folder beside it, ``<name>_files``.
        embed: Whether the page holds everything itself.
        device: Where to compute.

    Raises:
        ValueError: If a path is not usable, no image can be processed, or the model does not normalize its scores.
    """
    samples, predictor = find_samples(folder), load_predictor(model, device)
    return inspect_samples(predictor, samples, page, folder.resolve().name, model.name, embed)


def inspect_samples(
    predictor: Predictor, samples: Sequence[Sample], page: Path, title: str, model_name: str, embed: bool = False
) -> Inspection:
    """The same for images from anywhere, with the page's title and what it calls the model."""
    target = PageFolder(page, embed)
    own = target.files.resolve()
    samples = [sample for sample in samples if own not in sample.path.resolve().parents]
    image_threshold, pixel_threshold, pixels = Threshold(), Threshold(), PixelCounts()
    records: list[dict[str, Any]] = []
    result = Inspection(page, 0, {})
    for sample in tqdm(samples, "Inspecting", unit="image"):
        start = time.perf_counter()
        try:
            image = pictures.read_rgb(sample.path)
            prediction = predictor.predict(image)
            seen = pictures.crop(image, predictor.view)
            mask = predictor.view and sample.read_mask(prediction.anomaly_map.shape, predictor.view)
        # PIL's readers raise whatever a damaged file makes them trip over.
        except Exception as error:  # noqa: BLE001
            result.unreadable[sample.name] = " ".join(f"{type(error).__name__}: {error}".split())
            continue
        _check_normalized(prediction)
        predicted = time.perf_counter()
        if prediction.label is not None:
            image_threshold.update(np.array([prediction.score], dtype=np.float32), np.array([prediction.label]))
        if prediction.mask is not None:
            pixel_threshold.update(prediction.anomaly_map, prediction.mask)
        pixels.update(prediction.anomaly_map, mask)
        records.append(_record(sample, prediction, seen, mask, predictor, target, len(records)))
        result.predicting += predicted - start
        result.writing += time.perf_counter() - predicted
    if not records:
        why = "".join(f"; {name}: {reason}" for name, reason in list(result.unreadable.items())[:1])
        msg = f"samples must hold an image that can be processed, but none can{why}"
        raise ValueError(msg)
    start = time.perf_counter()
    target.write(
        title=title,
        model=model_name,
        windows=os.name == "nt",  # where commands are quoted in another way
        checkpoint=None if predictor.checkpoint is None else str(predictor.checkpoint),
        thresholds={"image": image_threshold.value, "pixel": pixel_threshold.value},
        pixels={kind: counts.tolist() for kind, counts in pixels.counts.items()},
        images=records,
        unreadable=[{"name": name, "reason": reason} for name, reason in result.unreadable.items()],
    )
    result.images = len(records)
    result.writing += time.perf_counter() - start
    return result


def _check_normalized(prediction: Prediction) -> None:
    extremes = (prediction.score, prediction.anomaly_map.min(), prediction.anomaly_map.max())
    if not all(0 <= value <= 1 for value in extremes):
        msg = (
            "model must normalize its scores to 0 to 1, as anomalib's PostProcessor does after a validation, but gives "
            f"{prediction.score:.4g}"
        )
        raise ValueError(msg)


def _record(
    sample: Sample,
    prediction: Prediction,
    seen: Image.Image,
    mask: NDArray[np.bool_] | None,
    predictor: Predictor,
    target: PageFolder,
    index: int,
) -> dict[str, Any]:
    """What the page is told about an image; its pictures are saved."""
    grey = pictures.grey_levels(prediction.anomaly_map)
    picture = pictures.shrunk(seen, pictures.EMBEDDED_PICTURE if target.embed else pictures.PICTURE)
    small_map = pictures.shrunk(Image.fromarray(grey), _SMALL_MAP).convert("RGB")
    defect = None if mask is None or not mask.any() else pictures.grey_webp(255 * mask.astype(np.uint8))
    record: dict[str, Any] = {
        "name": sample.name,
        "folder": "/".join(sample.name.split("/")[:-1]),
        "kind": sample.kind,
        "defective": sample.defective,
        "score": float(np.float32(prediction.score)),
        "width": seen.width,
        "height": seen.height,
        "thumbnail": pictures.data_uri(pictures.webp(pictures.shrunk(picture, pictures.THUMBNAIL), 70)),
        "small_map": pictures.data_uri(pictures.webp(small_map, 60)),
        "has_mask": defect is not None,
        **target.add(index, pictures.webp(picture), pictures.grey_webp(grey), defect),
    }
    if prediction.reason is not None:
        record["reason"] = _reason(prediction.reason, seen, predictor)
    return record


def _reason(reason: Reason, seen: Image.Image, predictor: Predictor) -> dict[str, Any] | None:
    """The two patches as pictures; None where the training image is no longer there."""
    try:
        normal = pictures.crop(pictures.read_rgb(reason.normal), predictor.view)
    except OSError:
        return None
    return {
        "place": reason.place,
        "name": reason.normal.name,
        "worst": pictures.data_uri(pictures.patch_picture(seen, reason.place)),
        "nearest": pictures.data_uri(pictures.patch_picture(normal, reason.normal_place)),
    }


def report(inspection: Inspection) -> Iterable[str]:
    """What to print of an inspection, line by line."""
    for name, reason in inspection.unreadable.items():
        yield f"Could not be processed: {name}: {reason}"
    yield (
        f"{inspection.images} images: predicted in {inspection.predicting:.1f} s, "
        f"pictures and page in {inspection.writing:.1f} s"
    )
    yield f"Open {inspection.page}"
