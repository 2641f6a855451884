"""Judges a fitted model on the test part of a data module, with several scores in one pass."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.metrics import AUPRO
from anomalib_cfa.views import average_views, central_view
from metrics import RawAUROC
from torch import Tensor

from anomalib_cfa import Cfa
from anomalib_cfa.anomaly_map import AnomalyMapGenerator, softmin_scores
from anomalib_cfa.torch_model import CfaModel

Scoring = tuple[str, float]
_PIXELS = 128  # a side of the maps that are judged: larger ones are thinned out, for the time that it saves


@torch.inference_mode()
def judge(
    model: Cfa, datamodule: Folder, scorings: Sequence[Scoring], central: Cfa | None = None
) -> list[dict[str, Any]]:
    """Measure image AUROC, pixel AUROC and AUPRO for each kind of defect against all normal images.

    Args:
        model: A fitted model; it is left as it was.
        datamodule: Its test part is judged; images in folders named for their kind, or ``good``.
        scorings: Scores, as the model names them, each with the sigma of the map's smoothing.
        central: Scores the central view, where the model has ``center_view``. None: the model itself.

    Returns:
        One row for each score and kind of defect.
    """
    maps: dict[Scoring, list[Tensor]] = defaultdict(list)
    masks: list[Tensor] = []
    kinds: list[str] = []
    image_scores: dict[Scoring, list[Tensor]] = defaultdict(list)
    pre_processor: Any = model.pre_processor
    with _evaluating(model):
        for batch in datamodule.test_dataloader():
            images = pre_processor.transform(batch.image)
            size = images.shape[-2:]
            step = max(1, size[0] // _PIXELS)
            anomaly_maps = _maps(model.model, images, scorings)
            if model.model.center_view:
                of_center = _maps((central or model).model, central_view(images), scorings)
                anomaly_maps = {
                    scoring: average_views(whole, of_center[scoring]) for scoring, whole in anomaly_maps.items()
                }
            for scoring, anomaly_map in anomaly_maps.items():
                image_scores[scoring].append(anomaly_map.amax(dim=(1, 2)))
                maps[scoring].append(anomaly_map[:, ::step, ::step].clone())
            truth = torch.nn.functional.interpolate(batch.gt_mask[:, None].float(), size)[:, 0, ::step, ::step] > 0
            masks.append(truth)
            kinds.extend(Path(path).parent.name for path in batch.image_path)
    truth, kind_of = torch.cat(masks), np.array(kinds)
    rows = []
    for scoring in scorings:
        measured = torch.cat(image_scores[scoring]), torch.cat(maps[scoring]), truth
        for kind in sorted({*kinds} - {"good"}):
            chosen = torch.from_numpy((kind_of == "good") | (kind_of == kind))
            rows.append({"score": scoring[0], "sigma": scoring[1], "kind": kind, **_measure(*measured, chosen)})
    return rows


def _maps(network: CfaModel, images: Tensor, scorings: Sequence[Scoring]) -> dict[Scoring, Tensor]:
    """Anomaly maps of shape (B, H, W)."""
    scores = _patch_scores(network, network.pyramid(images))
    return {
        (name, sigma): AnomalyMapGenerator(sigma)(scores[name], images.shape[-2:])[:, 0] for name, sigma in scorings
    }


def _patch_scores(network: CfaModel, pyramid: list[Tensor]) -> dict[str, Tensor]:
    """Every score that the model knows, from one search; each of shape (B, h, w)."""
    squared, indices = network.memory_bank.nearest(network.describe(pyramid), network.num_nearest_neighbors)
    distances = squared.sqrt()
    return {
        "calibrated": network.calibration(distances[..., 0], indices[..., 0]),
        "nearest": distances[..., 0],
        "softmin": softmin_scores(distances),
    }


def _measure(scores: Tensor, maps: Tensor, masks: Tensor, chosen: Tensor) -> dict[str, float]:
    scores, maps, masks = scores[chosen], maps[chosen], masks[chosen]
    batch: Any = ImageBatch(
        image=torch.empty(len(scores), 3, *maps.shape[1:]),
        pred_score=scores,
        gt_label=masks.flatten(1).any(dim=1),
        anomaly_map=maps,
        gt_mask=masks,
    )
    metrics: dict[str, Any] = {
        "image_auroc": RawAUROC(["pred_score", "gt_label"]),
        "pixel_auroc": RawAUROC(["anomaly_map", "gt_mask"]),
        "aupro": AUPRO(["anomaly_map", "gt_mask"]),
    }
    for metric in metrics.values():
        metric.update(batch)
    return {name: round(float(metric.compute()), 5) for name, metric in metrics.items()}


@contextmanager
def _evaluating(model: Cfa) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
