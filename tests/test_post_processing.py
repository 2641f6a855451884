import logging
import math

import pytest
import torch
from anomalib.data import Folder, ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback
from tiny import engine, mvtec, noise, tiny_cfa

from anomalib_cfa import Cfa
from anomalib_cfa.post_processing import OneClassPostProcessor, threshold_at_rate
from anomalib_cfa.training.out_of_bag import OutOfBagScores


def batch(scores, labels) -> ImageBatch:
    scores = torch.tensor(scores)
    maps = scores[:, None, None].expand(-1, 8, 8).clone()
    masks = torch.tensor(labels)[:, None, None].expand(-1, 8, 8)
    fields = {"image": noise(len(scores), 8, 8), "gt_label": torch.tensor(labels), "gt_mask": masks}
    return ImageBatch(pred_score=scores, anomaly_map=maps, **fields)


def validated(processor, scores, labels):
    for start in range(0, len(scores), 4):
        one = batch(scores[start : start + 4], labels[start : start + 4])
        processor.on_validation_batch_end(None, None, one, None, 0)
    processor.on_validation_epoch_end(None, None)
    return processor


@given(
    scores=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300),
    rate=st.sampled_from([0.001, 0.01, 0.05, 0.1, 0.5]),
)
def test_no_more_scores_than_asked_for_exceed_the_threshold(scores, rate):
    scores = torch.tensor(scores)
    threshold = threshold_at_rate(scores, rate)
    assert (scores > threshold).sum() <= rate * (len(scores) + 1)
    assert threshold <= scores.max() or rate * (len(scores) + 1) < 1


@pytest.mark.parametrize("count", [8, 50, 99, 500])
def test_a_further_normal_image_exceeds_the_threshold_about_as_often_as_asked(count):
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(300):
        gumbel = -torch.empty(count + 200).exponential_(generator=generator).log()
        rates.append((gumbel[count:] > threshold_at_rate(gumbel[:count], 0.01)).float().mean())
    assert torch.stack(rates).mean() < {8: 0.05, 50: 0.02}.get(count, 0.0125)


def test_normal_validation_images_set_threshold_and_range():
    scores = [float(score) for score in range(200)]
    processor = validated(OneClassPostProcessor(0.1), scores, [False] * 200)
    assert processor.image_threshold == processor.pixel_threshold == 180
    low, middle, high = (processor(InferenceBatch(pred_score=torch.tensor([s]), anomaly_map=torch.full((1, 8, 8), s)))
                         for s in (99.0, 180.0, 10_000.0))  # fmt: skip
    assert low.pred_score.item() == pytest.approx(1 / 3, abs=1e-6)
    assert (middle.pred_score.item(), high.pred_score.item()) == (0.5, 1)
    assert (low.pred_label.item(), middle.pred_label.item(), high.pred_label.item()) == (False, False, True)


def test_with_defects_among_the_validation_images_all_is_as_anomalibs_own():
    scores, labels = [1.0, 2.0, 3.0, 5.0, 4.0, 6.0], [False, False, False, False, True, True]
    ours, theirs = validated(OneClassPostProcessor(), scores, labels), validated(PostProcessor(), scores, labels)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_without_masks_the_pixel_threshold_comes_from_the_normal_images():
    processor = OneClassPostProcessor(0.1)
    normal, defective = batch([float(score) for score in range(99)], [False] * 99), batch([500.0], [True])
    for one in (normal, defective):
        one.gt_mask = None
        one.anomaly_map = one.anomaly_map / 1000  # on another scale than the image's score, as with score="local"
        processor.on_validation_batch_end(None, None, one, None, 0)
    processor.on_validation_epoch_end(None, None)
    assert processor.image_threshold > 98
    assert processor.pixel_threshold == pytest.approx(0.089)
    maps = processor(InferenceBatch(pred_score=torch.zeros(2), anomaly_map=torch.tensor([0.08, 0.5])[:, None, None]))
    assert maps.pred_mask.flatten().tolist() == [False, True]


def test_a_process_that_saw_defective_images_only_takes_part_in_the_gathering():
    """Each process gathers what it has of all; one that skipped that would leave the others waiting."""
    processor = OneClassPostProcessor(0.1)
    defective = batch([500.0], [True])
    defective.gt_mask = None
    processor.on_validation_batch_end(None, None, defective, None, 0)
    gathered = []
    compute = processor._pixel_scores.compute
    processor._pixel_scores.compute = lambda: gathered.append(compute()) or torch.arange(99.0)  # the other's
    processor.on_validation_epoch_end(None, None)
    assert len(gathered) == 1
    assert processor.pixel_threshold == 89


def test_defective_images_without_masks_alone_leave_the_pixel_threshold_to_anomalib():
    processor = OneClassPostProcessor(0.1)
    defective = batch([500.0, 600.0], [True, True])
    defective.gt_mask = None
    processor.on_validation_batch_end(None, None, defective, None, 0)
    processor.on_validation_epoch_end(None, None)
    assert processor.pixel_threshold == processor.image_threshold == 500


def test_a_single_defective_image_leaves_scores_that_tell_images_apart(caplog):
    processor = validated(OneClassPostProcessor(), [50.0], [True])
    assert processor.image_min < processor.image_threshold < processor.image_max
    scores = torch.tensor([40.0, 50.0, 60.0])
    normalized = processor(InferenceBatch(pred_score=scores, anomaly_map=scores[:, None, None])).pred_score
    assert 0 < normalized[0] < normalized[1] == 0.5 < normalized[2] < 1
    assert "No validation image is normal" in caplog.text


def test_a_validation_forgets_the_one_before():
    processor = validated(OneClassPostProcessor(0.1), [50.0] * 20, [False] * 20)
    validated(processor, [1.0, 9.0], [False, True])
    validated(processor, [2.0] * 20, [False] * 20)
    assert processor.image_threshold == 2


def test_what_is_switched_off_is_not_set():
    processor = validated(OneClassPostProcessor(enable_thresholding=False), [1.0, 2.0], [False, False])
    assert math.isnan(processor.image_threshold)
    assert processor.image_min < processor.image_max
    processor = validated(OneClassPostProcessor(enable_normalization=False), [1.0, 2.0], [False, False])
    assert math.isnan(processor.image_min)
    assert processor.image_threshold >= 2


@pytest.mark.parametrize("rate", [0, 0.5, 1, -0.1, math.nan, "0.01", True])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match=r"^false_alarm_rate must be a number above 0 and below 0\.5, but is "):
        OneClassPostProcessor(rate)


def test_a_rate_beside_a_post_processor_is_refused():
    with pytest.raises(ValueError, match=r"^false_alarm_rate must not be given beside a post_processor"):
        tiny_cfa(post_processor=False, false_alarm_rate=0.05)


def of_normal_images(root, **arguments) -> Folder:
    """Normal images, and nothing else."""
    return Folder("tile", normal_dir="train/good", root=root / "tile", num_workers=0, train_batch_size=4, **arguments)


def test_thresholds_from_one_of_two_views_are_warned_of(rendered_mvtec, tmp_path, caplog):
    datamodule = of_normal_images(rendered_mvtec, val_split_mode="none", test_split_mode="none")
    engine(tmp_path).fit(tiny_cfa(center_view=True), datamodule=datamodule)
    assert "scored without their central view" in caplog.text


# Anomalib takes a fifth of the images for tests, and half of those for validation: of six, none.
@pytest.mark.parametrize(
    ("images", "modes"), [(6, {"val_split_mode": "none", "test_split_mode": "none"}), (5, {})], ids=["none", "empty"]
)
@pytest.mark.parametrize("budget", [0, 1.0])
def test_without_validation_the_thresholds_come_from_training_images(
    rendered_mvtec, tmp_path, caplog, budget, images, modes
):
    model = tiny_cfa(feature_budget=budget)
    with caplog.at_level(logging.INFO, logger="anomalib_cfa"):
        run = engine(tmp_path)
        run.fit(model, datamodule=of_normal_images(rendered_mvtec, **modes))
    assert f"The thresholds come from {images} training images" in caplog.text
    assert "too few to tell which score 1 of 100 exceeds" in caplog.text
    saved = Cfa.load_from_checkpoint(run.trainer.checkpoint_callback.last_model_path or run.best_model_path)
    for name in ("image_threshold", "pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max"):
        assert torch.equal(getattr(saved.post_processor, name), getattr(model.post_processor, name))
        assert torch.isfinite(getattr(model.post_processor, name))
    assert saved.post_processor.false_alarm_rate == 0.01


@pytest.mark.parametrize("score", ["local", "nearest"])
def test_thresholds_from_training_images_are_on_the_scale_of_the_score(rendered_mvtec, tmp_path, score):
    model = tiny_cfa(score=score, lr=1e-12)  # so that every distance stays as it is after the epoch
    datamodule = of_normal_images(rendered_mvtec, val_split_mode="none", test_split_mode="none")
    engine(tmp_path).fit(model, datamodule=datamodule)
    network = model.model.eval()
    out_of_bag = OutOfBagScores(network, model.training_images, model.training_images)
    with torch.no_grad():
        for batch in datamodule.train_dataloader():
            model.pre_processor.on_predict_batch_start(None, None, batch, 0)
            out_of_bag.start_batch(batch.image_path, batch.image.shape[-2:])
            out_of_bag.update(*network.targets(network.pyramid(batch.image)))
    scores = torch.cat([predictions.pred_score for predictions in out_of_bag.predictions()])
    expected = threshold_at_rate(scores, 0.01)
    torch.testing.assert_close(model.post_processor._image_threshold, expected, rtol=1e-3, atol=0)


def test_the_last_epoch_alone_sets_the_thresholds(rendered_mvtec, tmp_path, caplog):
    datamodule = of_normal_images(rendered_mvtec, val_split_mode="none", test_split_mode="none")
    with caplog.at_level(logging.INFO, logger="anomalib_cfa"):
        engine(tmp_path, max_epochs=2).fit(tiny_cfa(), datamodule=datamodule)
    assert caplog.text.count("The thresholds come from 6 training images") == 2


def test_normal_images_held_out_set_the_thresholds(rendered_mvtec, tmp_path, caplog):
    model = tiny_cfa()
    with caplog.at_level(logging.INFO, logger="anomalib_cfa"):
        held_out = of_normal_images(rendered_mvtec, val_split_mode="from_train", val_split_ratio=0.5)
        engine(tmp_path).fit(model, datamodule=held_out)
    assert "2 normal validation images" in caplog.text
    assert "does not contain any anomalous" not in caplog.text
    assert torch.isfinite(model.post_processor.image_threshold)


def test_defective_validation_images_leave_the_choice_to_anomalib(rendered_mvtec, tmp_path, caplog):
    model = tiny_cfa()
    with caplog.at_level(logging.INFO, logger="anomalib_cfa"):
        engine(tmp_path).fit(model, datamodule=mvtec(rendered_mvtec))
    assert "The thresholds come from" not in caplog.text
    assert torch.isfinite(model.post_processor.image_threshold)


class Interrupt(Callback):
    """Fails after the first batch of a validation or a test."""

    def on_validation_batch_end(self, *_):
        msg = "interrupted"
        raise RuntimeError(msg)

    on_test_batch_end = on_validation_batch_end


@pytest.fixture(scope="module")
def uninterrupted(rendered_mvtec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return judged(fitted(tiny_cfa(), rendered_mvtec, folder), rendered_mvtec, folder)


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
def test_an_interrupted_run_leaves_no_image_to_the_next_one(uninterrupted, rendered_mvtec, tmp_path, run):
    model = tiny_cfa() if run == "fit" else fitted(tiny_cfa(), rendered_mvtec, tmp_path)
    interrupted = getattr(engine(tmp_path, callbacks=[Interrupt()]), run)
    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted(model, datamodule=mvtec(rendered_mvtec, category="metal_nut"))
    if run == "fit":
        model.clear_memory_bank()
        fitted(model, rendered_mvtec, tmp_path)
    assert judged(model, rendered_mvtec, tmp_path) == uninterrupted


def fitted(model, root, folder):
    engine(folder).fit(model, datamodule=mvtec(root))
    return model


def judged(model, root, folder):
    """Metrics by thresholds that are chosen anew."""
    run = engine(folder)
    return run.validate(model, datamodule=mvtec(root)) + run.test(model, datamodule=mvtec(root))


def test_a_validation_without_images_is_an_error(rendered_mvtec, tmp_path):
    with pytest.raises(
        ValueError, match=r"^datamodule must have images to validate on, but .* val_split_mode is 'none'"
    ):
        engine(tmp_path).validate(tiny_cfa(), datamodule=mvtec(rendered_mvtec, val_split_mode="none"))


@pytest.mark.parametrize("scores", [[3.0], [-2.0, -2.0], [0.0]])
def test_scores_without_a_spread_still_tell_images_apart(scores):
    post_processor = OneClassPostProcessor()
    maps = torch.tensor(scores)[:, None, None].expand(-1, 16, 16)
    post_processor.update(InferenceBatch(pred_score=torch.tensor(scores), anomaly_map=maps))
    post_processor.finish("images")
    threshold = float(max(scores))
    values = threshold + torch.linspace(-0.5, 0.5, 5)
    found = post_processor(InferenceBatch(pred_score=values, anomaly_map=values[:, None, None].expand(-1, 16, 16)))
    assert found.pred_score.diff().gt(0).all()
    assert found.pred_score[2] == pytest.approx(0.5)
