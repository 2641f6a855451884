import logging

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_cfa

from anomalib_cfa import Cfa
from anomalib_cfa.demo.render import render_mvtec
from anomalib_cfa.training.worst_fitting import log_worst, saved_worst_fitting, stand_out

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


# Of 1,024ths, since what a power of two scales must not be rounded.
@given(st.lists(st.integers(-(10**6), 10**6).map(lambda n: n / 1024), max_size=60), st.sampled_from([2**-9, 1, 2**9]))
def test_what_stands_out_is_the_top_whatever_the_scale(values, scale):
    scores = torch.tensor(values)
    found = stand_out(scores)
    assert torch.equal(stand_out(scores * scale), found)
    assert len(found) <= 5
    assert torch.equal(scores[found], scores.sort(descending=True).values[: len(found)])


@given(st.integers(8, 300))
def test_evenly_spread_scores_and_copies_have_none_that_stands_out(count):
    scores = torch.linspace(0, 1, count)
    assert len(stand_out(scores)) == 0
    assert len(stand_out(7 + 1e-5 * scores)) == 0


def test_of_fewer_than_eight_nothing_is_said():
    assert stand_out(torch.tensor([1.0] * 6 + [99.0])).tolist() == []
    assert stand_out(torch.tensor([1.0] * 7 + [99.0])).tolist() == [7]


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


def test_where_most_scores_are_zero_no_scale_says_what_is_far():
    assert stand_out(torch.tensor([0.0] * 9 + [0.6])).tolist() == []


def test_of_few_images_it_is_said_that_they_are_too_few(caplog):
    with caplog.at_level(logging.INFO, logger="anomalib_cfa"):
        log_worst([], images=7)
    assert "7 training images are too few to tell" in caplog.text
