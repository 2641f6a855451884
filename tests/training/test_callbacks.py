"""Lightning's own callbacks do with this model what they say, or are refused by their names."""

from datetime import timedelta

import pytest
import torch
from anomalib.callbacks import LoadModelCallback, TilerConfigurationCallback
from anomalib.callbacks import ModelCheckpoint as AnomalibCheckpoint
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BasePredictionWriter,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from tiny import noise, tiny_cfa

from anomalib_cfa import Cfa


def fit(root, folder, *callbacks, **options):
    """A fit of three batches an epoch."""
    defaults = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options = {name: value for name, value in (defaults | options).items() if value is not None}
    run = Engine(default_root_dir=folder, callbacks=list(callbacks), **options)
    model = tiny_cfa()
    run.fit(model, datamodule=data(root))
    return model.eval(), run


def data(root):
    return MVTecAD(root, category="tile", train_batch_size=2, eval_batch_size=4, num_workers=0)


@pytest.mark.parametrize(
    ("stopping", "epochs"),
    [
        (EarlyStopping("image_AUROC", mode="max", patience=1, min_delta=1), 2),
        (EarlyStopping("pixel_AUROC", mode="max", stopping_threshold=0.1), 1),
        (EarlyStopping("train_loss", patience=2, min_delta=1e9), 3),
        (EarlyStopping("train_radius", mode="max", patience=1, min_delta=1e9), 2),
    ],
    ids=lambda value: getattr(value, "monitor", None),
)
def test_early_stopping_stops_by_any_logged_metric(rendered_mvtec, tmp_path, stopping, epochs):
    _, run = fit(rendered_mvtec, tmp_path, stopping, max_epochs=6)
    assert run.trainer.current_epoch == epochs
    assert stopping.stopped_epoch == epochs - 1


@pytest.mark.parametrize(
    ("kind", "monitor", "mode"),
    [
        (ModelCheckpoint, "image_AUROC", "max"),
        (AnomalibCheckpoint, "pixel_AUROC", "min"),
        (AnomalibCheckpoint, "train_loss", "min"),
    ],
)
def test_a_checkpoint_of_any_logged_metric_is_of_the_best_epoch_and_predicts_as_it_did(
    rendered_mvtec, tmp_path, kind, monitor, mode
):
    images, values, maps = noise(2, 64, 64), [], []

    class Reader(Callback):
        def on_save_checkpoint(self, trainer, model, checkpoint):
            values.append(float(trainer.callback_metrics[monitor]))
            with torch.no_grad():
                model.eval()
                maps.append(model.model(model.pre_processor(images)).anomaly_map)
                model.train()

    saved = kind(tmp_path, "best-{epoch}", monitor=monitor, mode=mode, save_top_k=1)
    fit(rendered_mvtec, tmp_path, saved, Reader(), max_epochs=3)
    best = max(values) if mode == "max" else min(values)
    assert float(saved.best_model_score) == pytest.approx(best)
    restored = Cfa.load_from_checkpoint(saved.best_model_path).eval()
    with torch.no_grad():
        ours = restored.model(restored.pre_processor(images)).anomaly_map
    assert torch.equal(ours, maps[values.index(best)])


def test_a_checkpoint_of_a_step_loads_and_predicts(rendered_mvtec, tmp_path):
    fit(rendered_mvtec, tmp_path, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    prediction = Cfa.load_from_checkpoint(tmp_path / "step=2.ckpt").eval()(noise(1, 64, 64))
    assert prediction.anomaly_map.isfinite().all()


@pytest.mark.parametrize("callback", [EarlyStopping("nonsense"), ModelCheckpoint(monitor="nonsense")])
def test_a_metric_that_is_not_logged_is_named_with_those_that_are(rendered_mvtec, tmp_path, callback):
    with pytest.raises(Exception, match=r"nonsense(.|\n)*image_AUROC(.|\n)*pixel_AUROC(.|\n)*train_loss"):
        fit(rendered_mvtec, tmp_path, callback)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_timer_ends_a_fit_that_nothing_else_would(rendered_mvtec, tmp_path, interval):
    timer = Timer(timedelta(seconds=0.5), interval=interval)
    _, run = fit(rendered_mvtec, tmp_path, timer, max_epochs=None)
    assert timer.time_remaining() <= 0
    assert run.trainer.global_step > 0


def test_a_timer_that_only_measures_ends_no_fit(rendered_mvtec, tmp_path):
    timer = Timer()
    _, run = fit(rendered_mvtec, tmp_path, timer, max_epochs=None)
    assert run.trainer.current_epoch == run.trainer.max_epochs == 1
    assert timer.time_elapsed("train") > 0


def test_gradients_accumulate_as_scheduled(rendered_mvtec, tmp_path):
    _, run = fit(rendered_mvtec, tmp_path, GradientAccumulationScheduler({0: 1, 1: 3}))
    assert run.trainer.global_step == 3 + 1


class Finetuning(BackboneFinetuning):
    """A user's own."""


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (BackboneFinetuning(), "trains the backbone"),
        (Finetuning(), "trains the backbone"),
        (ModelPruning("l1_unstructured", amount=0.3), "prunes the backbone"),
        (StochasticWeightAveraging(swa_lrs=1e-3), "resets the batch normalization of the backbone"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_callbacks_that_would_change_the_frozen_backbone_are_refused_by_name(
    rendered_mvtec, tmp_path, callback, reason
):
    with pytest.raises(ValueError, match=f"^callbacks must not have {type(callback).__name__}: it {reason}"):
        fit(rendered_mvtec, tmp_path, callback)


def test_the_tiling_callback_is_refused_where_it_would_tile(rendered_mvtec, tmp_path):
    with pytest.raises(ValueError, match="Model does not support tiling"):
        fit(rendered_mvtec, tmp_path, TilerConfigurationCallback(enable=True, tile_size=32))
    fit(rendered_mvtec, tmp_path, TilerConfigurationCallback(enable=False))


def test_callbacks_that_watch_see_the_whole_fit(rendered_mvtec, tmp_path):
    epochs = []
    watching = [
        DeviceStatsMonitor(cpu_stats=False),
        LambdaCallback(on_train_epoch_end=lambda trainer, _: epochs.append(trainer.current_epoch)),
        LearningRateMonitor(),
        ModelSummary(max_depth=2),
        OnExceptionCheckpoint(tmp_path),
        ThroughputMonitor(batch_size_fn=lambda batch: batch.batch_size, window_size=2),
    ]
    logger = CSVLogger(tmp_path)
    fit(rendered_mvtec, tmp_path, *watching, logger=logger, log_every_n_steps=1)
    assert epochs == [0, 1]
    table = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert {"lr-AdamW", "train/device/samples_per_sec", "image_AUROC"} <= set(table[0].split(","))


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_progress_bars_count_the_steps(rendered_mvtec, tmp_path, bar):
    class Counting(bar):
        batches = 0

        def on_train_batch_end(self, *args, **kwargs):
            super().on_train_batch_end(*args, **kwargs)
            Counting.batches += 1

    fit(rendered_mvtec, tmp_path, Counting(), enable_progress_bar=True)
    assert Counting.batches == 6


def test_an_exception_leaves_a_checkpoint_that_predicts(rendered_mvtec, tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, model):
            raise RuntimeError("stopped")  # noqa: EM101

    with pytest.raises(RuntimeError, match="stopped"):
        fit(rendered_mvtec, tmp_path, OnExceptionCheckpoint(tmp_path, "stopped"), Stop())
    restored = Cfa.load_from_checkpoint(tmp_path / "stopped.ckpt").eval()
    assert restored(noise(1, 64, 64)).anomaly_map.isfinite().all()


def test_predictions_reach_a_writer_and_weights_a_loading_callback(rendered_mvtec, tmp_path):
    class Writer(BasePredictionWriter):
        scores = None

        def write_on_epoch_end(self, trainer, model, predictions, indices):
            self.scores = torch.cat([batch.pred_score for batch in predictions])

    model, run = fit(rendered_mvtec, tmp_path)
    scores = []
    for subject, callbacks in ((model, []), (tiny_cfa(), [LoadModelCallback(run.best_model_path)])):
        writer = Writer("epoch")
        Engine(callbacks=[writer, *callbacks], default_root_dir=tmp_path, accelerator="cpu", logger=False).predict(
            subject, datamodule=data(rendered_mvtec)
        )
        scores.append(writer.scores)
    assert len(scores[0]) == 8
    assert torch.equal(*scores)
