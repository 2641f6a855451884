from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUROC as ANOMALIBS_AUROC

from anomalib_cfa.metrics import AUROC


def area(metric, *batches):
    for scores, labels in batches:
        images = torch.zeros(len(scores), 3, 8, 8)
        metric.update(
            ImageBatch(image=images, pred_score=torch.tensor(scores), gt_label=torch.tensor(labels, dtype=torch.bool))
        )
    return float(metric.compute())


def auroc(*batches, kind=AUROC):
    return area(kind(["pred_score", "gt_label"], "image_"), *batches)


def test_large_scores_are_told_apart_in_any_batches():
    labels = [0, 0, 1, 0, 1, 1]
    scores = [20.0, 30.0, 50.0, 40.0, 60.0, 100.0]
    assert auroc((scores, labels)) == auroc((scores[:2], labels[:2]), (scores[2:], labels[2:])) == pytest.approx(1)
    mixed = ([0.2, 0.9], [0, 1]), ([1.5, 0.1], [1, 0])  # a batch within [0, 1], and one beyond
    assert auroc(*mixed) == 1


def test_scores_within_the_unit_interval_give_anomalibs_area():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(200, generator=generator).round(decimals=2)
    labels = torch.rand(200, generator=generator) < scores
    batch = scores.tolist(), labels.tolist()
    assert auroc(batch) == pytest.approx(auroc(batch, kind=ANOMALIBS_AUROC), abs=1e-6)


def test_the_area_does_not_change_under_a_monotone_map():
    scores, labels = [0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]
    assert auroc((scores, labels)) == auroc(([50 * score - 7 for score in scores], labels)) == pytest.approx(0.75)


def test_shapes_that_differ_are_refused():
    batch = SimpleNamespace(pred_score=torch.rand(2), gt_label=torch.ones(3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"same shape, but got .*2.* and .*3"):
        AUROC(["pred_score", "gt_label"]).update(batch)


def test_a_pixel_takes_no_more_memory_than_its_score_and_a_byte():
    auroc = AUROC(["anomaly_map", "gt_mask"])
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    auroc.update(ImageBatch(image=torch.zeros(2, 3, 8, 8), anomaly_map=torch.full((2, 8, 8), 20.0), gt_mask=masks))
    kept = [*auroc.preds, *auroc.target]
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) == (4 + 1) * masks.numel()


def test_the_name_is_that_of_anomalibs():
    assert AUROC(["pred_score", "gt_label"], "image_").name == "image_AUROC"
