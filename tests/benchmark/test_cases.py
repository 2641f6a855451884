"""The best and the worst images of a test."""

import pytest
import torch
from anomalib.data import ImageBatch
from benchmark_jobs import TINY
from torchvision.tv_tensors import Image

from anomalib_cfa import Cfa
from anomalib_cfa.benchmark.cases import CaseKeeper


def test_the_keeper_keeps_the_best_and_worst_of_each_kind(tmp_path):
    model = Cfa(**TINY)
    model.post_processor._image_threshold.fill_(1.0)
    keeper = CaseKeeper()
    for scores, labels in (([3.0, 0.9, 0.5], [1, 1, 0]), ([1.2, 1.4, 0.8], [0, 1, 0])):
        batch = ImageBatch(
            image=Image(torch.rand(3, 3, 32, 48)),
            gt_label=torch.tensor(labels),
            pred_score=torch.tensor(scores),
            anomaly_map=torch.rand(3, 32, 48),
            image_path=[f"tile/test/any/{score}.png" for score in scores],
        )
        keeper.on_test_batch_end(None, model, batch, None, 0)
    cases = keeper.draw(tmp_path / "cases", tmp_path)
    assert [(case.kind, case.is_defective, case.image) for case in cases] == [
        ("best", True, "any/3.0.png"),
        ("best", False, "any/0.5.png"),
        ("worst", True, "any/0.9.png"),
        ("worst", False, "any/1.2.png"),
    ]
    assert [case.margin for case in cases] == pytest.approx([2, 0.5, -0.1, -0.2])
    assert all((tmp_path / case.picture).is_file() for case in cases)
