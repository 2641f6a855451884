"""A model's predictions of a folder -> everything that the page shows."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from anomalib_cfa.inspect.page import Asset, PageFolder
from anomalib_cfa.inspect.pictures import (
    PICTURE,
    THUMBNAIL,
    crop,
    data_uri,
    grey_levels,
    grey_webp,
    patch_picture,
    shrunk,
    webp,
)
from anomalib_cfa.inspect.predictors import Prediction, Predictor, load_predictor
from anomalib_cfa.inspect.reasons import Reason
from anomalib_cfa.inspect.samples import Sample, find_samples

_PIXEL_THRESHOLDS = np.linspace(0, 1, 1001).astype(np.float32)
_SMALL_MAP = 64  # longer side of a thumbnail's heat map, in pixels


@dataclass
class Inspection:
    """What came of :func:`inspect_folder`.

    Attributes:
        page: The page.
        images: How many images it shows.
        unreadable: Names of the files that could not be judged, with the reasons.
        predicting: Seconds spent on reading and predicting the images.
        writing: Seconds spent on pictures and on the page.
    """

    page: Path
    images: int
    unreadable: dict[str, str]
    predicting: float = 0.0
    writing: float = 0.0


class Threshold:
    """Finds out a model's threshold from its verdicts: 0.5, anomalib's default, or what else agrees with them."""

    def __init__(self) -> None:
        self._negative, self._positive = -np.inf, np.inf  # highest score that is negative, and lowest positive one

    def update(self, scores: NDArray[np.float32], verdicts: NDArray[np.bool_]) -> None:
        """Take in scores and what the model made of them, both of any one shape."""
        self._negative = max(self._negative, scores.max(where=~verdicts, initial=-np.inf))
        self._positive = min(self._positive, scores.min(where=verdicts, initial=np.inf))

    @property
    def value(self) -> float:
        """A threshold that scores above it, and no others, are positive with."""
        if self._negative <= 0.5 < self._positive:
            return 0.5
        between = (np.clip(self._negative, 0, 1) + np.clip(self._positive, 0, 1)) / 2
        return round(float(between), 3)


class PixelCounts:
    """Counts pixels between thresholds a thousandth apart, the normal, the defective and the unlabelled."""

    def __init__(self) -> None:
        self.counts = {kind: np.zeros(len(_PIXEL_THRESHOLDS) + 1, dtype=np.int64) for kind in _PIXELS}

    def update(self, anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_] | None) -> None:
        """Take in an image: its map, and its true mask of the same shape if there is one."""
        # Place k holds what is above k thresholds.
        places = np.searchsorted(_PIXEL_THRESHOLDS, anomaly_map.ravel(), side="left")
        size = len(_PIXEL_THRESHOLDS) + 1
        if mask is None:
            self.counts["unknown"] += np.bincount(places, minlength=size)
            return
        defective = np.bincount(places[mask.ravel()], minlength=size)
        self.counts["defective"] += defective
        self.counts["normal"] += np.bincount(places, minlength=size) - defective


_PIXELS = ("normal", "defective", "unknown")


def inspect_folder(
    model: Path | Predictor,
    folder: Path,
    page: Path,
    embed: bool = False,
    device: str | None = None,
    title: str | None = None,
) -> Inspection:
    """Predict all images of a folder, and write the page on which to judge the predictions.

    Args:
        model: A checkpoint, an exported model, or a predictor.
        folder: Images, or a category in MVTec AD's layout, see :func:`~anomalib_cfa.inspect.samples.find_samples`.
        page: File to write. Unless all is embedded, pictures go to a folder beside it, ``<name>_files``.
        embed: Whether the page holds everything itself.
        device: Where to compute.
        title: The page's title. Default: the folder's name.

    Raises:
        ValueError: If a path names nothing fit, no image can be judged, or the model does not normalize its scores.
    """
    samples = find_samples(folder)
    predictor = load_predictor(model, device) if isinstance(model, Path) else model
    target = PageFolder(page, embed)
    samples = [sample for sample in samples if target.files not in sample.path.parents]
    image_threshold, pixel_threshold, pixels = Threshold(), Threshold(), PixelCounts()
    records: list[dict[str, Any]] = []
    result = Inspection(page, 0, {})
    for sample in tqdm(samples, "Inspecting", unit="image"):
        start = time.perf_counter()
        try:
            image = _read(sample.path)
            prediction = predictor.predict(image)
            seen = crop(image, predictor.view)
            mask = sample.read_mask(prediction.anomaly_map.shape, predictor.view)
        # PIL's readers raise whatever a damaged file makes them trip over.
        except Exception as error:  # noqa: BLE001
            result.unreadable[sample.name] = " ".join(f"{type(error).__name__}: {error}".split())
            continue
        _check_normalized(prediction)
        predicted = time.perf_counter()
        if prediction.label is not None:
            image_threshold.update(np.float32([prediction.score]), np.array([prediction.label]))
        if prediction.mask is not None:
            pixel_threshold.update(prediction.anomaly_map, prediction.mask)
        pixels.update(prediction.anomaly_map, mask)
        records.append(_record(sample, prediction, seen, mask, predictor, target, len(records)))
        result.predicting += predicted - start
        result.writing += time.perf_counter() - predicted
    if not records:
        name, reason = next(iter(result.unreadable.items()))
        msg = f"folder must hold an image that can be judged, but none can; {name}: {reason}"
        raise ValueError(msg)
    start = time.perf_counter()
    target.write(
        title=title or folder.resolve().name,
        model=predictor.checkpoint.name if predictor.checkpoint else (model.name if isinstance(model, Path) else ""),
        checkpoint=None if predictor.checkpoint is None else str(predictor.checkpoint),
        thresholds={"image": image_threshold.value, "pixel": pixel_threshold.value},
        pixels={kind: counts.tolist() for kind, counts in pixels.counts.items()},
        images=records,
        unreadable=[{"name": name, "reason": reason} for name, reason in result.unreadable.items()],
    )
    result.images = len(records)
    result.writing += time.perf_counter() - start
    return result


def _read(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


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
    """What the page is told of an image, with its pictures saved."""
    grey = grey_levels(prediction.anomaly_map, 0, 1)
    picture = shrunk(seen, PICTURE)
    small_map = shrunk(Image.fromarray(grey), _SMALL_MAP).convert("RGB")
    has_mask = mask is not None and bool(mask.any())
    asset = Asset(
        picture=webp(picture),
        heat_map=grey_webp(grey),
        mask=grey_webp(255 * mask.astype(np.uint8)) if has_mask and mask is not None else None,
    )
    record = {
        "name": sample.name,
        "folder": "/".join(sample.name.split("/")[:-1]),
        "kind": sample.kind,
        "defective": sample.defective,
        "score": float(np.float32(prediction.score)),
        "width": seen.width,
        "height": seen.height,
        "thumbnail": data_uri(webp(shrunk(picture, THUMBNAIL), 70)),
        "small_map": data_uri(webp(small_map, 60)),
        "has_mask": has_mask,
        **target.add(index, asset),
    }
    if prediction.reason is not None:
        record["reason"] = _reason(prediction.reason, seen, predictor)
    return record


def _reason(reason: Reason, seen: Image.Image, predictor: Predictor) -> dict[str, Any] | None:
    """The two patches as pictures; None where the training image is no longer there."""
    try:
        normal = crop(_read(reason.normal), predictor.view)
    except OSError:
        return None
    return {
        "place": reason.place,
        "name": reason.normal.name,
        "worst": data_uri(patch_picture(seen, reason.place)),
        "nearest": data_uri(patch_picture(normal, reason.normal_place)),
    }


def report(inspection: Inspection) -> Iterable[str]:
    """What to print of an inspection, line by line."""
    for name, reason in inspection.unreadable.items():
        yield f"Could not be judged: {name}: {reason}"
    yield (
        f"{inspection.images} images: predicted in {inspection.predicting:.1f} s, "
        f"pictures and page in {inspection.writing:.1f} s"
    )
    yield f"Open {inspection.page}"
