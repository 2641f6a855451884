import logging

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_cfa

from anomalib_cfa import Cfa
from anomalib_cfa.demo.render import render_mvtec
from anomalib_cfa.torch_model import CfaModel
from anomalib_cfa.training.processes import Processes
from anomalib_cfa.training.worst_fitting import TrainingScores, saved_worst_fitting, stand_out

USUAL = st.lists(st.floats(1, 2, width=32), min_size=8, max_size=60)


@given(USUAL, st.floats(20, 1e6, width=32), st.data())
def test_a_score_far_above_the_rest_stands_out_wherever_it_is(usual, odd, data):
    place = data.draw(st.integers(0, len(usual)))
    scores = torch.tensor([*usual[:place], odd, *usual[place:]])
    assert stand_out(scores)[0] == place


@given(USUAL, st.integers(1, 20))
def test_odd_scores_do_not_hide_each_other_while_they_are_fewer_than_half(usual, count):
    odd = min(count, len(usual) - 1)
    found = stand_out(torch.tensor(usual + [50.0] * odd))
    assert (found >= len(usual)).sum() == min(odd, 5)


@given(st.lists(st.floats(-1e3, 1e3, width=32), max_size=60), st.sampled_from([2**-9, 1, 2**9]))
def test_what_stands_out_is_the_top_whatever_the_scale(values, scale):
    scores = torch.tensor(values)
    found = stand_out(scores)
    assert torch.equal(stand_out(scores * scale), found)
    assert len(found) <= 5
    assert torch.equal(scores[found], scores.sort(descending=True).values[: len(found)])


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(8, 300))
def test_evenly_spread_scores_and_copies_have_none_that_stands_out(seed, count):
    scores = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    assert len(stand_out(scores)) == 0
    assert len(stand_out(7 + 1e-5 * scores)) == 0


def test_of_fewer_than_eight_nothing_is_said():
    assert stand_out(torch.tensor([1.0] * 6 + [99.0])).tolist() == []
    assert stand_out(torch.tensor([1.0] * 7 + [99.0])).tolist() == [7]


def network(score="nearest", centers=60):
    torch.manual_seed(0)
    model = CfaModel("test_resnet.r160_in1k", pre_trained=False, search="exact", score=score).eval()
    sources = torch.stack([torch.arange(centers) % 3, torch.zeros(centers), torch.zeros(centers)], dim=1)
    model.assign_bank(torch.randn(centers, model.descriptor.width), sources)
    return model


def patches_of(model, images, seed=1):
    return torch.randn(images, 4, 4, model.descriptor.width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 6], ids=["whole bank searched at times", "most among the targets"])
def test_a_patch_is_measured_to_the_nearest_centre_that_is_not_its_images_own(k):
    model, names = network(), ["a", "b", "c"]
    scores, patches = TrainingScores(model, names, names), patches_of(model, 3)
    scores.start_batch(["c", "a", "b"])
    for block in patches.split(2):
        scores.update(*model.memory_bank.nearest(block, k), block)
    owners = model.memory_bank.sources[:, 0]
    distances = torch.cdist(patches.double().flatten(1, 2), model.memory_bank.centers.double())
    expected = [distances[batch][:, owners != image].amin(dim=1).amax() for batch, image in ((1, 0), (2, 1), (0, 2))]
    torch.testing.assert_close(scores._scores, torch.stack(expected).float())


def test_an_image_that_a_data_set_holds_twice_is_not_fitted_by_its_copy():
    model = network()
    names = ["a", "b", "a"]
    scores, patches = TrainingScores(model, names, names), patches_of(model, 1)
    scores.start_batch(["a"])
    scores.update(*model.memory_bank.nearest(patches, 6), patches)
    others = model.memory_bank.centers[model.memory_bank.sources[:, 0] == 1]
    expected = torch.cdist(patches.flatten(0, 2), others).amin(dim=1).amax()
    torch.testing.assert_close(scores._scores[2], expected)


@pytest.mark.parametrize(
    ("bank_images", "batch"),
    [([], ["a"]), (["x", "y", "z"], ["a"]), (["a"], ["a"])],
    ids=["the bank's images are not known", "the bank is of other images", "sources beyond the images"],
)
def test_where_no_centre_is_known_to_be_its_own_all_count(bank_images, batch):
    model = network()
    scores, patches = TrainingScores(model, bank_images, ["a", "b"]), patches_of(model, 1)
    scores.start_batch(batch)
    scores.update(*model.memory_bank.nearest(patches, 6), patches)
    expected = torch.cdist(patches.flatten(0, 2), model.memory_bank.centers).amin(dim=1).amax()
    torch.testing.assert_close(scores._scores[0], expected)


def test_images_that_are_not_listed_or_not_named_are_passed_over():
    model = network()
    scores, patches = TrainingScores(model, ["a"], ["a"]), patches_of(model, 1)
    for paths in (["elsewhere"], None):
        scores.start_batch(paths)
        scores.update(*model.memory_bank.nearest(patches, 6), patches)
    assert scores._scores.isnan().all()


def test_a_single_image_has_nothing_to_be_compared_with():
    model = network()
    model.memory_bank.sources.zero_()
    scores, patches = TrainingScores(model, ["a"], ["a"]), patches_of(model, 1)
    scores.start_batch(["a"])
    scores.update(*model.memory_bank.nearest(patches, 6), patches)
    assert scores.worst(Processes()) == []


def test_processes_put_their_images_together():
    model, names = network(), [str(number) for number in range(20)]
    parts = [TrainingScores(model, names, names) for _ in range(2)]
    for number, name in enumerate(names + names[:1]):  # a sampler fills up with the first
        part = parts[number % 2]
        patches = patches_of(model, 1, seed=int(name)) * (20 if name == "13" else 1)
        part.start_batch([name])
        part.update(*model.memory_bank.nearest(patches, 6), patches)
    sent = []
    for part in parts:
        part.worst(Processes(sum=lambda tensor: sent.append(tensor) or tensor))
    worst = [part.worst(Processes(sum=lambda _: sum(sent))) for part in parts]
    assert worst[0] == worst[1]
    assert [path for path, _ in worst[0]] == ["13"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Roots of a data set of sixteen training images, and of the same with one that is not of their kind."""
    clean, dirty = tmp_path_factory.mktemp("clean"), tmp_path_factory.mktemp("dirty")
    for root in (clean, dirty):
        render_mvtec(root, ["tile"], num_train=16, num_good=2, num_defective=1, image_size=64)
    path = odd_image(dirty)
    odd = np.asarray(Image.open(path)).copy()
    odd[20:44, 16:40] = np.random.default_rng(0).integers(0, 255, (24, 24, 3))
    Image.fromarray(odd).save(path)
    return clean, dirty


def odd_image(root):
    return root / "tile/train/good/005.png"


def fit(root, folder, **options):
    data = MVTecAD(root, category="tile", train_batch_size=5, num_workers=0)
    model = tiny_cfa(evaluator=False, **options)
    quick = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "limit_val_batches": 0}
    engine = Engine(default_root_dir=folder, max_epochs=2, **quick)
    engine.fit(model, datamodule=data)
    return model, engine


@pytest.mark.parametrize(
    "options",
    [{}, {"feature_budget": 0}, {"bank": "mean"}],
    ids=["kept", "not kept", "a bank without sources"],
)
def test_an_image_of_another_kind_is_named_with_its_path(images, tmp_path, caplog, options):
    with caplog.at_level(logging.INFO, logger="anomalib_cfa"):
        model, engine = fit(images[1], tmp_path, **options)
    assert model.worst_fitting[0][0] == str(odd_image(images[1]))
    (record,) = [record for record in caplog.records if record.name.endswith("worst_fitting")]
    assert record.levelname == "WARNING"
    assert f"{odd_image(images[1])} ({model.worst_fitting[0][1]:.3g})" in record.message
    loaded = Cfa.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path)
    assert loaded.worst_fitting == model.worst_fitting
    model.clear_memory_bank()
    assert model.worst_fitting == []


@pytest.mark.parametrize("options", [{}, {"feature_budget": 0}], ids=["kept", "not kept"])
def test_of_clean_images_none_is_named(images, tmp_path, caplog, options):
    with caplog.at_level(logging.INFO, logger="anomalib_cfa"):
        model, _ = fit(images[0], tmp_path, **options)
    assert model.worst_fitting == []
    (record,) = [record for record in caplog.records if record.name.endswith("worst_fitting")]
    assert record.levelname == "INFO"


@pytest.mark.parametrize("saved", [None, 3, [1], [["a", "b"]], [[1, 2.0]], {"a": 1.0}, [("a",)]])
def test_a_damaged_entry_of_a_checkpoint_names_nothing(saved):
    assert saved_worst_fitting(saved) == []


def test_an_entry_of_a_checkpoint_is_read():
    assert saved_worst_fitting([["a.png", 3.5], ("b.png", 2.0)]) == [("a.png", 3.5), ("b.png", 2.0)]
