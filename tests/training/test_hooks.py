"""What hooks into a fit, or lends it something, finds what it expects."""

import pickle
from functools import partial

import pytest
from anomalib.data import AnomalibDataset, ImageBatch, MVTecAD
from anomalib.engine import Engine
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    WeightAveraging,
)
from tiny import fit_to_noise, tiny_cfa

from anomalib_cfa.torch_model import CfaModel


def fit(root, folder, datamodule=None, **options):
    datamodule = datamodule or MVTecAD(root, category="tile", train_batch_size=4, num_workers=0)
    options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, **options}
    Engine(default_root_dir=folder, **options).fit(tiny_cfa(evaluator=False), datamodule=datamodule)
    return datamodule


def test_callbacks_see_what_a_batch_is_of_in_every_epoch(rendered_mvtec, tmp_path):
    seen = []

    class Reader(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            labels = batch.gt_label.tolist()
            seen.append(
                (trainer.current_epoch, sorted(batch.image_path), batch.batch_size, labels, batch.image is None)
            )

    datamodule = fit(rendered_mvtec, tmp_path, callbacks=[Reader()])
    for epoch in (0, 1):
        paths = [path for number, paths, *_ in seen for path in paths if number == epoch]
        assert sorted(paths) == sorted(datamodule.train_data.samples.image_path)
    assert all(len(paths) == size == len(labels) and not any(labels) for _, paths, size, labels, _ in seen)
    assert all(without_pixels for *_, without_pixels in seen)  # the bank's pass has read them


class Paths(Callback):
    """Keeps the paths of each epoch's images, in their order."""

    def on_fit_start(self, trainer, pl_module):
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.setdefault(trainer.current_epoch, []).extend(map(str, batch.image_path))


def embedded(monkeypatch) -> list[int]:
    """How many images pass the backbone, batch by batch."""
    counts, pyramid = [], CfaModel.pyramid
    monkeypatch.setattr(CfaModel, "pyramid", lambda self, images: counts.append(len(images)) or pyramid(self, images))
    return counts


@pytest.mark.parametrize("options", [{}, {"reload_dataloaders_every_n_epochs": 1}], ids=str)
def test_workers_read_each_image_once(rendered_mvtec, tmp_path, monkeypatch, options):
    counts, paths = embedded(monkeypatch), Paths()
    reads, read = tmp_path / "reads", AnomalibDataset.__getitem__

    def noted(self, index):
        with reads.open("a") as file:  # the workers are other processes
            file.write(".")
        return read(self, index)

    monkeypatch.setattr(AnomalibDataset, "__getitem__", noted)
    datamodule = MVTecAD(rendered_mvtec, category="tile", train_batch_size=4, num_workers=2)
    datamodule.train_dataloader = partial(with_timeout, datamodule)
    fit(rendered_mvtec, tmp_path, datamodule, callbacks=[paths], limit_val_batches=0, **options)
    assert sum(counts) == len(reads.read_text()) == len(datamodule.train_data)
    assert [len(epoch) for epoch in paths.seen.values()] == [len(datamodule.train_data)] * 2


def with_timeout(datamodule):
    loader = MVTecAD.train_dataloader(datamodule)
    loader.timeout = 60
    return loader


def test_a_fit_that_goes_on_sees_the_order_that_it_would_have_seen(rendered_mvtec, tmp_path):
    orders, checkpoint = [], None
    for number, options in enumerate(({"max_epochs": 3}, {"max_epochs": 1}, {"max_epochs": 3})):
        paths = Paths()
        datamodule = MVTecAD(rendered_mvtec, category="tile", train_batch_size=2, num_workers=2)
        run = Engine(
            default_root_dir=tmp_path / str(number), accelerator="cpu", logger=False, callbacks=[paths], **options
        )
        # Features that are not kept: the workers read in every epoch.
        model = tiny_cfa(evaluator=False, feature_budget=0)
        run.fit(model, datamodule=datamodule, ckpt_path=checkpoint if number == 2 else None)
        checkpoint = run.trainer.checkpoint_callback.best_model_path
        orders.append(paths.seen)
    whole, first, rest = orders
    assert whole == {**first, **rest}
    assert whole[0] != whole[1]


def test_a_limited_fit_is_of_the_images_that_it_draws(rendered_mvtec, tmp_path):
    paths, model = Paths(), tiny_cfa(evaluator=False)
    datamodule = MVTecAD(rendered_mvtec, category="tile", train_batch_size=1, num_workers=0)
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "limit_train_batches": 3}
    Engine(default_root_dir=tmp_path, callbacks=[paths], **options).fit(model, datamodule=datamodule)
    assert model.training_images == sorted(paths.seen[0])
    assert len(model.training_images) == 3


def test_an_engine_validates_again_where_it_can(rendered_mvtec, tmp_path):
    """After a run with a data module that has no images for it."""
    model = fit_to_noise(tiny_cfa())
    run = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    without = MVTecAD(rendered_mvtec, category="tile", num_workers=0, val_split_mode="none")
    run.test(model, datamodule=without)
    assert run.trainer.limit_val_batches == 1.0
    (metrics,) = run.validate(model, datamodule=MVTecAD(rendered_mvtec, category="tile", num_workers=0))
    assert "image_AUROC" in metrics


def test_a_data_module_is_given_back_as_it_was(rendered_mvtec, tmp_path):
    datamodule = MVTecAD(rendered_mvtec, category="tile", num_workers=0)
    fit(rendered_mvtec, tmp_path, datamodule)
    assert "train_dataloader" not in vars(datamodule)

    def mine():
        return type(datamodule).train_dataloader(datamodule)

    datamodule.train_dataloader = mine
    fit(rendered_mvtec, tmp_path, datamodule)
    assert datamodule.train_dataloader is mine


class Stop(Callback):
    def on_train_batch_end(self, *args):
        raise RuntimeError("stopped")  # noqa: EM101


def test_an_interrupted_fit_leaves_nothing_that_the_next_one_sees(rendered_mvtec, tmp_path):
    datamodule = MVTecAD(rendered_mvtec, category="tile", num_workers=0)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(rendered_mvtec, tmp_path, datamodule, callbacks=[Stop()])
    assert "train_dataloader" not in vars(datamodule)
    assert all(isinstance(batch, ImageBatch) for batch in datamodule.train_dataloader())
    fit(rendered_mvtec, tmp_path, datamodule)


def test_a_copy_made_in_a_fit_holds_no_training_image(rendered_mvtec, tmp_path):
    copies = []

    class Copy(Callback):
        def on_train_end(self, trainer, pl_module):
            copies.append(pickle.dumps(pl_module))

    run = Engine(default_root_dir=tmp_path, max_epochs=1, logger=False, accelerator="cpu", callbacks=[Copy()])
    model = tiny_cfa(evaluator=False)
    run.fit(model, datamodule=MVTecAD(rendered_mvtec, category="tile", num_workers=0))
    assert len(copies[0]) == pytest.approx(len(pickle.dumps(model)), abs=1000)


@pytest.mark.parametrize(
    "callback",
    [BatchSizeFinder(batch_arg_name="train_batch_size"), LearningRateFinder(), WeightAveraging(), EMAWeightAveraging()],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_come_before_the_bank_are_refused_by_name(rendered_mvtec, tmp_path, callback):
    with pytest.raises(ValueError, match=f"callbacks must not have {type(callback).__name__}: it .* before the memory"):
        fit(rendered_mvtec, tmp_path, callbacks=[callback])
