"""What hooks into a fit, or lends it something, finds what it expects."""

import pytest
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    WeightAveraging,
)
from tiny import tiny_cfa


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
    fit(rendered_mvtec, tmp_path, datamodule)
    assert "train_dataloader" not in vars(datamodule)


@pytest.mark.parametrize(
    "callback",
    [BatchSizeFinder(batch_arg_name="train_batch_size"), LearningRateFinder(), WeightAveraging(), EMAWeightAveraging()],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_come_before_the_bank_are_refused_by_name(rendered_mvtec, tmp_path, callback):
    with pytest.raises(ValueError, match=f"callbacks must not have {type(callback).__name__}: it .* before the memory"):
        fit(rendered_mvtec, tmp_path, callbacks=[callback])
