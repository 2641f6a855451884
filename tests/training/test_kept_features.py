import os

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_cfa.training.kept_features import FeatureStore, IndexedBatch, IndexedDataset, file_signature


def pyramid(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 4, 8, 6, generator=generator), torch.randn(count, 6, 4, 3, generator=generator)]


def batch(index, missing):
    index, missing = torch.tensor(index), torch.tensor(missing)
    paths, labels = [f"{place}.png" for place in index.tolist()], torch.zeros(len(index), dtype=torch.bool)
    return IndexedBatch(paths, index, signature=index + 100, missing=missing, image=None, gt_label=labels)


@pytest.mark.parametrize("budget", [2**20, 0], ids=["memory", "file"])
def test_gives_back_in_half_precision_what_was_put(tmp_path, budget):
    store = FeatureStore(10, budget, tmp_path)
    features = pyramid(4)
    store.put(torch.tensor([7, 1, 3, 0]), torch.tensor([5, 6, 7, 8]), features)
    for kept, original in zip(store.get(torch.tensor([3, 7]), torch.device("cpu")), features, strict=True):
        torch.testing.assert_close(kept, original[[2, 0]].half().float())
        assert kept.is_contiguous(memory_format=torch.channels_last)
    assert store.signatures.tolist() == [8, 6, 0, 7, 0, 0, 0, 5, 0, 0]
    assert not store.is_complete


def test_a_file_beyond_the_budget_has_no_name_from_the_start(tmp_path):
    store = FeatureStore(10, 1000, tmp_path)
    store.put(torch.arange(10), torch.arange(1, 11), pyramid(10))
    assert store.is_complete
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_on_disk_is_said_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: os.terminal_size((0, 0)) and type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="set feature_budget=0"):
        FeatureStore(10, 0, tmp_path).put(torch.arange(2), torch.ones(2, dtype=torch.long), pyramid(2))


def test_a_batch_is_completed_with_rounded_features_in_its_order(tmp_path):
    store = FeatureStore(6, 2**20, tmp_path)
    first, second = pyramid(2, seed=1), pyramid(3, seed=2)
    store.complete(batch([4, 2], [True, True]), first)
    completed = store.complete(batch([0, 2, 5, 4, 1], [True, False, True, False, True]), second)
    for level, old, new in zip(completed, first, second, strict=True):
        expected = torch.stack([new[0], old[1], new[1], old[0], new[2]]).half().float()
        assert torch.equal(level, expected)


def test_a_value_too_large_for_half_precision_is_not_kept_and_not_lost(tmp_path):
    store = FeatureStore(3, 2**20, tmp_path)
    features = pyramid(2)
    features[1][0, 0, 0, 0] = 1e5
    completed = store.complete(batch([2, 0], [True, True]), features)
    assert completed[1][0, 0, 0, 0] == 1e5
    assert store.signatures.tolist() == [100, 0, 0]


def test_nothing_is_kept_once_disabled(tmp_path):
    store = FeatureStore(3, 2**20, tmp_path)
    store.enabled = False
    features = pyramid(1)
    completed = store.complete(batch([1], [True]), features)
    assert torch.equal(completed[0], features[0])
    assert not store.signatures.any()


def test_an_image_is_read_until_its_features_are_kept_and_again_when_its_file_changes(rendered_mvtec):
    from anomalib.data import MVTecAD

    datamodule = MVTecAD(rendered_mvtec, category="tile")
    datamodule.setup("fit")
    images = datamodule.train_data
    dataset = IndexedDataset(images, torch.zeros(len(images), dtype=torch.int64))
    index, signature, item = dataset[1]
    assert (index, signature) == (1, file_signature(dataset.paths[1]))
    assert torch.equal(item.image, images[1].image)

    dataset.signatures[1] = signature
    assert dataset[1][2] is None
    collated = dataset.collate_fn([dataset[0], dataset[1], dataset[2]])
    assert collated.missing.tolist() == [True, False, True]
    assert torch.equal(collated.image[1], images[2].image)
    assert dataset.collate_fn([dataset[1]]).image is None

    os.utime(dataset.paths[1], ns=(1, 1))
    assert dataset[1][2] is not None


def test_signature_changes_with_the_file(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    before = file_signature(path)
    assert before == file_signature(path) != 0
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(path)
    assert file_signature(path) != before
