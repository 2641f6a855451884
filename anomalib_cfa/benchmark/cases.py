"""The test images that a model does best and worst on: kept during the test, drawn, and shown on a page."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch, NumpyImageItem
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.models.components import AnomalibModule
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchvision.transforms import v2

from anomalib_cfa.benchmark.folder import Case, Result

_PANEL_HEIGHT = 192


class CaseKeeper(Callback):
    """Keeps the images of a test with the largest and the smallest margin, of the defective and of the normal ones.

    The margin is how far an image's score lies on the right side of the threshold. Lightning calls this before the
    model's post-processor, when scores are not yet clamped to [0, 1], which would make many of them equal.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, bool], tuple[Case, dict[str, Any]]] = {}  # with fields of NumpyImageItem

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: object, *args: object) -> None:
        """Keep those images of a batch that have a larger or smaller margin than the ones kept before."""
        del trainer, args
        assert isinstance(pl_module, AnomalibModule)
        if not isinstance(outputs, ImageBatch) or outputs.pred_score is None or outputs.gt_label is None:
            return
        threshold = _value(pl_module.post_processor, "image_threshold")
        scores, labels = outputs.pred_score.flatten().tolist(), outputs.gt_label.flatten().tolist()
        for index, (score, label) in enumerate(zip(scores, labels, strict=True)):
            margin = (score - threshold) * (1 if label else -1)
            for kind, sign in (("best", 1), ("worst", -1)):
                before = self._kept.get((kind, bool(label)))
                if math.isnan(margin) or (before is not None and sign * margin <= sign * before[0].margin):
                    continue
                name = "/".join(Path(outputs.image_path[index]).parts[-2:]) if outputs.image_path else str(index)
                picture = f"{kind}_{'defective' if label else 'normal'}.jpg"
                case = Case(kind, name, bool(label), score, threshold, margin, picture)
                self._kept[kind, bool(label)] = case, _pictured(outputs, index, pl_module)

    def draw(self, folder: Path, root: Path) -> list[Case]:
        """Draw what was kept: the best before the worst, and the defective before the normal image.

        The cases' paths are relative to ``root``, the run's folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        cases = []
        for case, pictured in sorted(self._kept.values(), key=lambda kept: (kept[0].kind, not kept[0].is_defective)):
            path = folder / case.picture
            _draw(pictured, path)
            cases.append(replace(case, picture=path.relative_to(root).as_posix()))
        return cases


def _value(owner: object, name: str) -> float:
    value = getattr(owner, name, None)
    return float(value) if isinstance(value, Tensor) else math.nan


def _pictured(batch: ImageBatch, index: int, model: AnomalibModule) -> dict[str, Any]:
    images: Any = batch.image
    image = _unnormalized(images[index], model)
    pictured = {"image": (image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()}
    mask = torch.zeros(image.shape[-2:]) if batch.gt_mask is None else batch.gt_mask[index].squeeze()
    pictured["gt_mask"] = (mask > 0).cpu().numpy()
    if batch.anomaly_map is not None:
        low, high, threshold = (
            _value(model.post_processor, name) for name in ("pixel_min", "pixel_max", "pixel_threshold")
        )
        anomaly_map = batch.anomaly_map[index].squeeze().float().cpu()
        # As the post-processor scales: the threshold is in the middle of the colours.
        scaled = 0.5 + (anomaly_map - threshold) / max(high - low, 1e-12)
        pictured["anomaly_map"] = (scaled.nan_to_num().clamp(0, 1) * 255).round().byte().numpy()
        pictured["pred_mask"] = (anomaly_map > threshold).numpy()
    return pictured


def _unnormalized(image: Tensor, model: AnomalibModule) -> Tensor:
    transform = getattr(model.pre_processor, "transform", None)
    for normalize in extract_transforms_by_type(transform, v2.Normalize):
        mean, std = (image.new_tensor(values)[:, None, None] for values in (normalize.mean, normalize.std))
        image = image * std + mean
    return image.clamp(0, 1)


def _draw(pictured: dict[str, Any], path: Path) -> None:
    height, width = pictured["image"].shape[:2]
    drawn = visualize_image_item(
        NumpyImageItem(**pictured),
        fields=["image", "gt_mask"],
        overlay_fields=[("image", ["anomaly_map"]), ("image", ["pred_mask"])],
        field_size=(round(width * _PANEL_HEIGHT / height), _PANEL_HEIGHT),
        text_config={"enable": False},
    )
    assert drawn is not None  # there are fields to draw
    drawn.convert("RGB").save(path, quality=90)


def heat_map_page(results: Sequence[Result], labels: Sequence[str]) -> Iterator[str]:
    """Sections of a Markdown page: one for each category, with the pictures of each setting's first seed."""
    yield "# Best and worst cases"
    yield (
        "From left to right: image, ground truth, heat map, predicted outline. Best and worst is by how far a score "
        "lies on the right side of the threshold, among the defective and among the normal images: the worst defective "
        "one is the most likely to be missed, the worst normal one the most likely false alarm. Colours share a scale "
        "within a category, with the pixel threshold in the middle."
    )
    first: dict[tuple[str, str], Result] = {}
    for result, label in sorted(zip(results, labels, strict=True), key=lambda pair: pair[0].spec.seed):
        first.setdefault((result.spec.category, label), result)
    shown = None
    for (category, label), result in sorted(first.items(), key=lambda item: item[0]):
        if category != shown:
            yield f"## {category}"
        shown = category
        yield f"### {label}, seed {result.spec.seed}"
        yield from map(_captioned, result.cases)


def _captioned(case: Case) -> str:
    title = f"{case.kind} {'defective' if case.is_defective else 'normal'}"
    verdict = f"{'right' if case.margin > 0 else 'wrong'} by {abs(case.margin):.2g}"
    figures = f"score {case.score:.3g}, threshold {case.threshold:.3g}: {verdict}"
    return f"{title.capitalize()}: `{case.image}`, {figures}\n\n![{title}, {case.image}]({case.picture})"
