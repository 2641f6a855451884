import sys
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO, AUROC
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from metrics import NormalFalsePositivesAUPRO, RawAUROC


def measured(metric, maps, masks):
    """A metric's value, the batch taken in in two parts."""
    for part in (slice(None, len(maps) // 2), slice(len(maps) // 2, None)):
        metric.update(
            ImageBatch(
                image=torch.zeros(len(maps[part]), 3, *maps.shape[1:]),
                pred_score=maps[part].amax(dim=(1, 2)),
                gt_label=masks[part].flatten(1).any(dim=1),
                anomaly_map=maps[part],
                gt_mask=masks[part],
            )
        )
    return float(metric.compute())


def images(seed):
    """Maps in [0, 1] of twelve images, half of them with a square defect that scores higher, and the masks."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(12, 16, 16, dtype=torch.bool)
    masks[6:, 4:8, 4:8] = True
    order = torch.randperm(12, generator=generator)
    maps = 0.6 * torch.rand(masks.shape, generator=generator) + 0.3 * masks
    return maps[order], masks[order]


@given(seed=st.integers(0, 99), scale=st.floats(1, 1000), shift=st.floats(-1000, 1000))
def test_auroc_does_not_depend_on_the_range_of_the_scores(seed, scale, shift):
    maps, masks = images(seed)
    maps = (64 * maps).round()  # so that no scale and shift makes ties
    for fields in (["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]):
        expected = measured(AUROC(fields), maps / 64, masks)
        assert measured(RawAUROC(fields), scale * maps + shift, masks) == pytest.approx(expected, abs=1e-6)


def test_false_positives_in_defective_images_are_left_out():
    maps, masks = images(0)
    fields = ["anomaly_map", "gt_mask"]
    plain = measured(AUPRO(fields), maps, masks)
    of_normal = measured(NormalFalsePositivesAUPRO(fields), maps, masks)
    assert of_normal == pytest.approx(plain, abs=0.05)
    maps[masks.roll(4, dims=1)] = 1
    assert measured(AUPRO(fields), maps, masks) < plain - 0.05
    assert measured(NormalFalsePositivesAUPRO(fields), maps, masks) == of_normal
    maps[~masks.flatten(1).any(dim=1), :2] = 1
    assert measured(NormalFalsePositivesAUPRO(fields), maps, masks) < plain - 0.05
