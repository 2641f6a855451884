import copy
import logging
import pickle
import shutil
from contextlib import nullcontext
from itertools import chain

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.transforms import SquarePad
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.callbacks import Callback, EarlyStopping
from omegaconf import OmegaConf
from PIL import Image
from tiny import engine, fit_to_noise, mvtec, noise, tiny_cfa
from torchvision.transforms import v2

from anomalib_cfa import Cfa
from anomalib_cfa.lightning_model import DEFAULT_EPOCHS
from anomalib_cfa.training.loaders import check_images


class Losses(Callback):
    """Records each step's loss and the batch's images."""

    def __init__(self):
        self.values, self.order = [], []

    def on_train_batch_end(self, trainer, model, outputs, batch, index):
        self.values.append(outputs["loss"].item())
        self.order.append(batch.index.tolist())


@pytest.fixture(scope="module")
def fitted(rendered_mvtec, tmp_path_factory):
    model = tiny_cfa()
    folder = tmp_path_factory.mktemp("fitted")
    run = engine(folder, max_epochs=2, callbacks=[losses := Losses()])
    run.fit(model, datamodule=mvtec(rendered_mvtec))
    return model, run.trainer.checkpoint_callback.last_model_path or run.best_model_path, losses


def predictions(model, datamodule):
    batches = engine(datamodule.root).predict(model, datamodule=datamodule, return_predictions=True)
    return torch.cat([batch.pred_score for batch in batches]), torch.cat([batch.anomaly_map for batch in batches])


def test_fit_builds_the_bank_and_trains_descriptor_and_radius_but_not_the_backbone(fitted):
    model, _, losses = fitted
    fresh = tiny_cfa()
    patches = 6 * 8 * 8
    assert model.model.memory_bank.centers.shape == (patches // 2, sum(model.model.patch_features.channels))
    assert sum(losses.values[3:]) < sum(losses.values[:3])
    assert model.model.radius != fresh.model.radius
    for ours, theirs in zip(
        model.model.patch_features.parameters(), fresh.model.patch_features.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad
    assert not model.model.patch_features.training
    trained = model.configure_optimizers().param_groups[0]["params"]
    assert {id(parameter) for parameter in trained} == {
        id(model.model.descriptor.weight),
        id(model.model.descriptor.bias),
        id(model.model.radius),
    }


def test_the_descriptor_starts_as_far_whitened_as_is_asked(rendered_mvtec, tmp_path):
    spreads = []
    for whitening in (0, 0.5, 1):
        model = tiny_cfa(whitening=whitening, lr=1e-9)
        engine(tmp_path).fit(model, datamodule=mvtec(rendered_mvtec))
        stretched = torch.linalg.svdvals(model.model.descriptor.weight.detach()[:, :-2])
        spreads.append(float(stretched.max() / stretched.min()))
    none, half, whole = spreads
    assert none == pytest.approx(1, abs=1e-3)
    assert half**2 == pytest.approx(whole, rel=1e-2)
    assert half > 2


def test_test_gives_image_and_pixel_metrics(fitted, rendered_mvtec, tmp_path):
    (metrics,) = engine(tmp_path).test(fitted[0], datamodule=mvtec(rendered_mvtec))
    assert set(metrics) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score", "pixel_AUPRO"}


def test_images_pass_the_pre_processor_before_the_bank_and_in_training(rendered_mvtec, tmp_path):
    class Seen(PreProcessor):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            low.append(batch.image.min().item())

    low = []
    transform = Cfa.configure_pre_processor(64).transform
    model = tiny_cfa(pre_processor=Seen(transform), image_size=None)
    engine(tmp_path).fit(model, datamodule=mvtec(rendered_mvtec))
    assert len(low) > 3
    assert max(low) < 0  # pixels are not negative, normalized ones are


def test_a_checkpoint_restores_everything_without_weights_file_or_hub(rendered_mvtec, tmp_path, monkeypatch):
    weights = tmp_path / "weights.pth"
    state = tiny_cfa(seed=3).model.patch_features.network.state_dict()
    torch.save({name.removeprefix("model."): value for name, value in state.items()}, weights)
    model = tiny_cfa(pre_trained=True, weights_path=str(weights))
    run = engine(tmp_path)
    run.fit(model, datamodule=mvtec(rendered_mvtec))
    weights.unlink()
    restored = Cfa.load_from_checkpoint(run.best_model_path)
    for name, value in model.model.state_dict().items():
        assert torch.equal(restored.model.state_dict()[name], value), name
    for ours, theirs in zip(
        predictions(restored.eval(), mvtec(rendered_mvtec)),
        predictions(model.eval(), mvtec(rendered_mvtec)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_a_resumed_fit_ends_where_the_uninterrupted_one_does(rendered_mvtec, tmp_path):
    class Stop(Callback):
        def on_train_epoch_start(self, trainer, model):
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    whole, broken, resumed = tiny_cfa(), tiny_cfa(), tiny_cfa(seed=0)
    engine(tmp_path / "whole", max_epochs=4).fit(whole, datamodule=mvtec(rendered_mvtec))
    run = engine(tmp_path / "broken", max_epochs=4, callbacks=[Stop()])
    with pytest.raises(BaseException):  # noqa: B017, PT011 - Lightning turns it into an exit
        run.fit(broken, datamodule=mvtec(rendered_mvtec))
    run2 = engine(tmp_path / "resumed", max_epochs=4)
    run2.fit(resumed, datamodule=mvtec(rendered_mvtec), ckpt_path=run.best_model_path)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_second_fit_keeps_the_bank_and_says_so(rendered_mvtec, tmp_path, caplog):
    model = tiny_cfa()
    engine(tmp_path).fit(model, datamodule=mvtec(rendered_mvtec))
    bank = model.model.memory_bank.centers.clone()
    with caplog.at_level(logging.INFO, logger="anomalib_cfa"):
        engine(tmp_path).fit(model, datamodule=mvtec(rendered_mvtec, category="metal_nut"))
    assert torch.equal(model.model.memory_bank.centers, bank)
    assert "continues with the model's memory bank" in caplog.text
    assert "None of the training images is one of those" in caplog.text
    model.clear_memory_bank()
    assert model.post_processor.image_threshold.isnan()
    with pytest.raises(RuntimeError, match="memory bank is not built"):
        model(torch.rand(1, 3, 64, 64))
    fresh = tiny_cfa()
    for each in (model, fresh):
        engine(tmp_path).fit(each, datamodule=mvtec(rendered_mvtec, category="metal_nut"))
    for name, value in fresh.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value), name


def test_an_engine_that_would_not_train_a_second_model_says_so(rendered_mvtec, tmp_path):
    run = engine(tmp_path, max_epochs=None)
    run.fit(tiny_cfa(), datamodule=mvtec(rendered_mvtec))
    with pytest.raises(RuntimeError, match=r"has run its 1 epochs .* take a new Engine for each fit"):
        run.fit(tiny_cfa(), datamodule=mvtec(rendered_mvtec))


def test_the_size_of_the_central_view_is_checked_before_long_work():
    with pytest.raises(ValueError, match=r"center_view must be False for images of 64 x 64 .* 56 x 56"):
        tiny_cfa(backbone="test_vit.r160_in1k", center_view=True)
    tiny_cfa(backbone="test_vit.r160_in1k", image_size=128, center_view=True)


def test_a_crop_behind_the_data_module_comes_too_late_to_give_one_size(tmp_path):
    for folder in ("good", "bad"):
        (tmp_path / folder).mkdir()
        for number, size in enumerate([(64, 64), (80, 64)]):
            Image.new("RGB", size).save(tmp_path / folder / f"{number}.png")
    options = {"root": tmp_path, "normal_dir": "good", "abnormal_dir": "bad", "num_workers": 0}
    model = tiny_cfa(pre_processor=PreProcessor(v2.CenterCrop(64)), image_size=None)
    with pytest.raises(ValueError, match="pre_processor must first resize"):
        engine(tmp_path).fit(model, datamodule=Folder("sizes", **options))
    engine(tmp_path).fit(model, datamodule=Folder("sizes", **options, train_batch_size=1, eval_batch_size=1))


@pytest.mark.parametrize("bank", ["kmeans", "mean", "ema"])
def test_the_same_seed_gives_the_same_model_whatever_the_global_seed(rendered_mvtec, tmp_path, bank):
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = tiny_cfa(bank=bank, gamma_c=4)
        engine(tmp_path).fit(model, datamodule=mvtec(rendered_mvtec))
        models.append(model.model.state_dict())
    for name, value in models[0].items():
        assert torch.equal(models[1][name], value), name


def test_order_changes_with_the_epoch_and_the_seed(fitted, rendered_mvtec, tmp_path):
    order = fitted[2].order
    assert sorted(chain(*order[:3])) == sorted(chain(*order[3:])) == list(range(6))
    assert order[:3] != order[3:]
    run = engine(tmp_path, callbacks=[other := Losses()])
    run.fit(tiny_cfa(seed=5), datamodule=mvtec(rendered_mvtec))
    assert other.order != order[:3]


@pytest.mark.parametrize("budget", [0, 1e-9], ids=["not kept", "kept in a file"])
def test_training_is_the_same_with_and_without_kept_features(fitted, rendered_mvtec, tmp_path, budget):
    losses = Losses()
    losses.on_train_batch_end = lambda trainer, model, outputs, batch, index: losses.values.append(
        outputs["loss"].item()
    )
    engine(tmp_path, max_epochs=2, callbacks=[losses]).fit(
        tiny_cfa(feature_budget=budget), datamodule=mvtec(rendered_mvtec)
    )
    assert losses.values == pytest.approx(fitted[2].values, rel=0.02)


def test_images_are_read_once_where_nothing_random_touches_them(rendered_mvtec, tmp_path, monkeypatch):
    from anomalib.data.datasets.base import image

    reads = []
    read_image = image.read_image
    monkeypatch.setattr(image, "read_image", lambda path, **kwargs: reads.append(path) or read_image(path, **kwargs))
    engine(tmp_path, max_epochs=4, limit_val_batches=0).fit(tiny_cfa(), datamodule=mvtec(rendered_mvtec))
    assert len(reads) == len(set(reads)) == 6
    augmented = mvtec(rendered_mvtec, train_augmentations=v2.RandomHorizontalFlip())
    engine(tmp_path, max_epochs=4, limit_val_batches=0).fit(tiny_cfa(), datamodule=augmented)
    assert len(reads) >= 6 + 4 * 6


def test_features_are_kept_with_workers_and_limited_batches(rendered_mvtec, tmp_path):
    losses = Losses()
    run = engine(tmp_path, max_epochs=3, limit_train_batches=2, callbacks=[losses], limit_val_batches=0)
    run.fit(tiny_cfa(), datamodule=mvtec(rendered_mvtec, num_workers=2))
    assert len(losses.values) == 6
    assert all(torch.tensor(losses.values).isfinite())


def test_a_changed_pre_processor_is_noticed(rendered_mvtec, tmp_path, caplog):
    class Change(Callback):
        def on_train_epoch_start(self, trainer, model):
            if trainer.current_epoch == 1:
                model.pre_processor.transform = v2.Compose([v2.Resize((64, 64)), v2.Normalize([0.4] * 3, [0.5] * 3)])

    with caplog.at_level(logging.INFO, logger="anomalib_cfa"):
        engine(tmp_path, max_epochs=2, callbacks=[Change()]).fit(tiny_cfa(), datamodule=mvtec(rendered_mvtec))
    assert "transforms have changed; their features are newly kept" in caplog.text


@pytest.mark.parametrize(
    ("trainer", "epochs"), [({}, DEFAULT_EPOCHS), ({"max_epochs": 1000}, 1000), ({"max_steps": 2}, -1)]
)
def test_epochs_default_only_where_none_are_given(rendered_mvtec, tmp_path, trainer, epochs):
    class StopAtOnce(Callback):
        def on_train_start(self, trainer, model):
            trainer.should_stop = True

    run = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[StopAtOnce()], **trainer)
    run.fit(tiny_cfa(), datamodule=mvtec(rendered_mvtec))
    assert run.trainer.max_epochs == epochs


def test_early_stopping_on_pixel_auroc_finds_its_metric(rendered_mvtec, tmp_path):
    stopping = EarlyStopping(monitor="pixel_AUROC", mode="max", patience=1)
    engine(tmp_path, max_epochs=2, callbacks=[stopping]).fit(tiny_cfa(), datamodule=mvtec(rendered_mvtec))
    assert stopping.best_score > 0


def test_losses_and_radius_are_logged(rendered_mvtec, tmp_path):
    run = engine(tmp_path)
    run.fit(tiny_cfa(), datamodule=mvtec(rendered_mvtec))
    assert {"train_loss", "train_attraction", "train_repulsion", "train_radius"} <= set(run.trainer.callback_metrics)


def test_mixed_precision_trains(rendered_mvtec, tmp_path):
    model = tiny_cfa()
    engine(tmp_path, precision="bf16-mixed").fit(model, datamodule=mvtec(rendered_mvtec))
    assert all(parameter.isfinite().all() for parameter in model.model.descriptor.parameters())


def test_images_need_not_be_square(rendered_mvtec, tmp_path):
    model = tiny_cfa(image_size=[48, 80], center_crop_size=[40, 64])
    engine(tmp_path).fit(model, datamodule=mvtec(rendered_mvtec))
    assert model.eval()(torch.rand(1, 3, 30, 70)).anomaly_map.shape == (1, 40, 64)


def test_lists_of_a_config_become_plain_data(tmp_path):
    layers = OmegaConf.create(["layer2", "layer3"])
    model = tiny_cfa(layers=layers, image_size=OmegaConf.create([64, 64]))
    assert type(model.hparams["layers"]) is list
    assert type(model.hparams["image_size"]) is list
    torch.save(dict(model.hparams), tmp_path / "hparams.pt")
    torch.load(tmp_path / "hparams.pt", weights_only=True)


def test_models_are_copied_and_pickled(fitted):
    image = torch.rand(1, 3, 64, 64)
    model = fitted[0].eval()
    expected = model(image).pred_score
    assert torch.equal(copy.deepcopy(model)(image).pred_score, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(image).pred_score, expected)


def test_predicting_before_the_bank_exists_is_refused():
    with pytest.raises(RuntimeError, match="memory bank is not built yet"):
        tiny_cfa().eval()(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_images_never_become_a_score(fitted, value):
    images = torch.rand(2, 3, 64, 64)
    images[1, 0, 3, 3] = value
    with pytest.raises(ValueError, match="finite"):
        fitted[0].model.eval()(images)


def test_too_few_centers_for_the_targets_is_refused_at_the_first_batch(rendered_mvtec, tmp_path):
    with pytest.raises(ValueError, match="at most the memory bank's size of 4 centres"):
        engine(tmp_path).fit(tiny_cfa(gamma_c=16), datamodule=mvtec(rendered_mvtec))


# A resize of the shorter side alone leaves them as different as they were.
@pytest.mark.parametrize("resize", [[], [v2.Resize(64)]], ids=["none", "shorter side"])
def test_images_of_different_sizes_without_a_resize_to_one_are_refused(tmp_path, resize):
    for folder in ("good", "bad"):
        (tmp_path / folder).mkdir()
        for number, size in enumerate([(64, 64), (80, 64), (64, 64), (64, 64)]):
            Image.new("RGB", size).save(tmp_path / folder / f"{number}.png")
    datamodule = Folder("sizes", root=tmp_path, normal_dir="good", abnormal_dir="bad", num_workers=0)
    transform = v2.Compose([*resize, v2.Normalize([0.5] * 3, [0.5] * 3)])
    model = tiny_cfa(pre_processor=PreProcessor(transform), image_size=None)
    with pytest.raises(ValueError, match=r"pre_processor must first resize .* 64 x 64, .* 80 x 64"):
        engine(tmp_path).fit(model, datamodule=datamodule)
    datamodule.train_data.augmentations = v2.Compose([SquarePad(), *resize])
    of_squares = nullcontext() if resize else pytest.raises(ValueError, match="pre_processor must first resize")
    with of_squares:
        check_images(datamodule.train_dataloader(), None)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_images_that_anomalibs_reader_would_clip_are_refused(tmp_path, dtype):
    for folder in ("good", "bad"):
        (tmp_path / folder).mkdir()
        for number in range(4):
            Image.fromarray(np.full((64, 64), 1000, dtype)).save(tmp_path / folder / f"{number}.tiff")
    datamodule = Folder("deep", root=tmp_path, normal_dir="good", abnormal_dir="bad", num_workers=0)
    with pytest.raises(ValueError, match=r"must have 8 bits per channel, .* is of Pillow's mode '[IF]"):
        engine(tmp_path).fit(tiny_cfa(), datamodule=datamodule)


def test_sizes_beside_a_pre_processor_are_refused():
    with pytest.raises(ValueError, match="image_size and center_crop_size must not be given beside a pre_processor"):
        tiny_cfa(pre_processor=Cfa.configure_pre_processor(64), image_size=64)


def test_a_checkpoint_of_another_structure_is_refused_by_name(fitted, rendered_mvtec, tmp_path):
    with pytest.raises(ValueError, match=r"gamma_d must be 1, .* but is 2; on the command line: --model.gamma_d 1"):
        engine(tmp_path).test(tiny_cfa(gamma_d=2), datamodule=mvtec(rendered_mvtec), ckpt_path=fitted[1])


def test_a_checkpoint_of_anomalibs_own_cfa_is_refused_with_what_to_do(fitted):
    checkpoint = torch.load(fitted[1], weights_only=True)
    checkpoint["state_dict"] = {"model.memory_bank": torch.rand(4, 4)}
    with pytest.raises(ValueError, match="ANOMALIB_CFA_REGISTER=0"):
        tiny_cfa().on_load_checkpoint(checkpoint)


def test_a_fitted_model_takes_the_state_of_one_with_a_larger_bank():
    small, large = fit_to_noise(tiny_cfa(), images=2), fit_to_noise(tiny_cfa(), images=5)
    small.load_state_dict(large.state_dict())
    images = noise(3, 64, 64, seed=9)
    with torch.no_grad():
        found, wanted = small.model(images), large.model(images)
    assert torch.equal(found.pred_score, wanted.pred_score)
    assert torch.equal(found.anomaly_map, wanted.anomaly_map)


def test_a_fit_that_goes_on_with_moved_images_keeps_its_thresholds(rendered_mvtec, tmp_path, caplog):
    """Scored by the centres that they gave themselves, they would make thresholds far too low."""
    before = shutil.copytree(rendered_mvtec, tmp_path / "before")
    model = tiny_cfa()
    run = engine(tmp_path)
    run.fit(model, datamodule=mvtec(before, val_split_mode="none"))
    threshold = model.post_processor.image_threshold.clone()
    assert threshold.isfinite()
    run.trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = tiny_cfa()
    moved = mvtec(before.rename(tmp_path / "after"), val_split_mode="none")
    engine(tmp_path, max_epochs=2).fit(again, datamodule=moved, ckpt_path=tmp_path / "model.ckpt")
    assert again.post_processor.image_threshold == threshold
    assert "neither thresholds nor odd images are found by these" in caplog.text
    assert again.model.calibration.deviation.gt(0).all()
