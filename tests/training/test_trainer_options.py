"""Each option of Lightning's trainer does with this model what it says, or is refused by its name."""

import time
from copy import deepcopy

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from tiny import noise, tiny_cfa

from anomalib_cfa.training.checks import check_trainer

IMAGES, BATCHES = 6, 3  # of the rendered training set, two images a batch
PATCHES = 64  # of an image: half as many centres


class Counts(Callback):
    """What a fit did."""

    def __init__(self):
        self.batches, self.validated, self.gradients, self.inference = 0, 0, [], []

    def on_train_batch_end(self, trainer, model, *args):
        self.batches += 1
        gradients = [parameter.grad for parameter in model.model.trained_parameters() if parameter.grad is not None]
        self.gradients.append(torch.cat([gradient.flatten() for gradient in gradients]))

    def on_validation_batch_end(self, *args):
        self.validated += 1
        self.inference.append(torch.is_inference_mode_enabled())


def fit(root, folder, **options):
    """A fit of two epochs of three batches, and of two validation batches each."""
    counts = Counts()
    defaults = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options = {name: value for name, value in (defaults | options).items() if value is not None}
    if options.get("barebones"):
        options = {name: value for name, value in options.items() if name not in {"logger", "enable_progress_bar"}}
    run = Engine(default_root_dir=folder, callbacks=[counts, *options.pop("callbacks", [])], **options)
    model = tiny_cfa()
    run.fit(model, datamodule=data(root))
    return model, run, counts


def data(root):
    return MVTecAD(root, category="tile", train_batch_size=2, eval_batch_size=4, num_workers=0)


def is_usable(model):
    with torch.no_grad():
        prediction = model.eval()(noise(2, 50, 70))
    return bool(prediction.pred_score.isfinite().all() and prediction.anomaly_map.isfinite().all())


@pytest.fixture(scope="module")
def plain(rendered_mvtec, tmp_path_factory):
    return fit(rendered_mvtec, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("options", "steps", "batches", "images"),
    [
        ({}, 6, 6, IMAGES),
        ({"limit_train_batches": 0.5}, 2, 2, 2),
        ({"limit_train_batches": 2}, 4, 4, 4),
        ({"overfit_batches": 1}, 2, 2, 2),
        ({"overfit_batches": 0.7}, 4, 4, 4),
        ({"fast_dev_run": True}, 1, 1, 2),
        ({"fast_dev_run": 2}, 2, 2, 4),
        ({"accumulate_grad_batches": 2}, 4, 6, IMAGES),
        ({"max_steps": 1}, 1, 1, IMAGES),
        ({"max_steps": 1, "max_epochs": None}, 1, 1, IMAGES),
        ({"max_steps": 0}, 0, 0, IMAGES),
        ({"max_epochs": 0}, 0, 0, IMAGES),
        ({"max_time": {"seconds": 0}, "max_epochs": None}, 0, 0, IMAGES),
        ({"min_epochs": 2, "max_epochs": 3, "min_steps": 9}, 9, 9, IMAGES),
        ({"reload_dataloaders_every_n_epochs": 1}, 6, 6, IMAGES),
        ({"barebones": True}, 6, 6, IMAGES),
    ],
    ids=str,
)
def test_steps_batches_and_images_are_as_many_as_asked_for(rendered_mvtec, tmp_path, options, steps, batches, images):
    model, run, counts = fit(rendered_mvtec, tmp_path, **options)
    assert (run.trainer.global_step, counts.batches) == (steps, batches)
    assert len(model.training_images) == images
    assert len(model.model.memory_bank.centers) == images * PATCHES // 2
    assert model.model.calibration.deviation.ne(1).all()  # as it is before the score is calibrated
    assert is_usable(model)


def test_time_ends_a_fit_that_nothing_else_would(rendered_mvtec, tmp_path):
    start = time.monotonic()
    model, run, _ = fit(rendered_mvtec, tmp_path, max_time={"seconds": 1}, max_epochs=-1)
    assert time.monotonic() - start < 30
    assert run.trainer.global_step > 0
    assert is_usable(model)


@pytest.mark.parametrize(
    ("options", "validated"),
    [
        ({}, 4),
        ({"limit_val_batches": 0}, 0),
        ({"limit_val_batches": 1}, 2),
        ({"limit_val_batches": 0.5}, 2),
        ({"val_check_interval": 1}, 12),
        ({"val_check_interval": 0.34}, 12),
        ({"check_val_every_n_epoch": 2}, 2),
        ({"check_val_every_n_epoch": None, "val_check_interval": 2}, 4),
        ({"num_sanity_val_steps": 2}, 4),  # overridden, as with anomalib's own: there is no bank yet
    ],
    ids=str,
)
def test_validation_runs_as_often_as_asked_for_and_leaves_no_trace(rendered_mvtec, tmp_path, plain, options, validated):
    model, _, counts = fit(rendered_mvtec, tmp_path, **options)
    assert counts.validated == validated
    for name, value in plain[0].model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "32"},
        {"deterministic": True},
        {"benchmark": True},
        {"detect_anomaly": True},
        {"sync_batchnorm": True},
        {"use_distributed_sampler": False},
        {"log_every_n_steps": 1},
        {"enable_model_summary": False},
        {"enable_progress_bar": True},
        {"enable_autolog_hparams": False},
        {"strategy": "auto", "devices": 1, "num_nodes": 1},
    ],
    ids=str,
)
def test_what_must_not_change_the_model_does_not(rendered_mvtec, tmp_path, plain, options):
    model, *_ = fit(rendered_mvtec, tmp_path, **options)
    for name, value in plain[0].model.state_dict().items():
        torch.testing.assert_close(model.model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_inference_mode_is_as_asked_for_and_changes_no_metric(rendered_mvtec, tmp_path, plain, inference_mode):
    counts = Counts()
    run = Engine(
        default_root_dir=tmp_path, callbacks=[counts], inference_mode=inference_mode, accelerator="cpu", logger=False
    )
    (metrics,) = run.validate(plain[0], datamodule=data(rendered_mvtec), verbose=False)
    assert set(counts.inference) == {inference_mode}
    expected = plain[1].trainer.callback_metrics
    assert metrics["pixel_AUROC"] == pytest.approx(float(expected["pixel_AUROC"]), abs=1e-3)


@pytest.mark.parametrize(("algorithm", "order"), [("norm", 2), ("value", float("inf"))])
def test_gradients_are_clipped(rendered_mvtec, tmp_path, plain, algorithm, order):
    limit = 1e-4
    _, _, counts = fit(rendered_mvtec, tmp_path, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    norms = [float(gradient.norm(order)) for gradient in counts.gradients]
    assert len(norms) == 6
    assert max(norms) <= limit * 1.001
    assert min(float(gradient.norm(order)) for gradient in plain[2].gradients) > limit


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", 16, "bf16"])
def test_mixed_precision_predicts_nearly_the_same(rendered_mvtec, tmp_path, plain, precision):
    model, run, _ = fit(rendered_mvtec, tmp_path, precision=precision)
    (metrics,) = run.test(model, datamodule=data(rendered_mvtec), verbose=False)
    assert 0 <= metrics["pixel_AUROC"] <= 1
    ours, expected = (fitted.eval().model(noise(2, 64, 64)).pred_score for fitted in (model, plain[0]))
    torch.testing.assert_close(ours, expected, rtol=0.1, atol=0)


def test_an_accelerator_without_float64_is_refused_by_name(monkeypatch, tmp_path):
    run = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    monkeypatch.setattr("lightning.pytorch.Trainer.accelerator", MPSAccelerator())
    with pytest.raises(ValueError, match=r"^accelerator must not be 'mps'"):
        run.fit(tiny_cfa(), datamodule=data(tmp_path))


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_other_precisions_are_refused_by_name_at_every_stage(rendered_mvtec, tmp_path, plain, precision, stage):
    run = Engine(default_root_dir=tmp_path, precision=precision, accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match=f"^precision must be one of '32-true', .*, but is '{precision}'"):
        getattr(run, stage)(tiny_cfa() if stage == "fit" else plain[0], datamodule=data(rendered_mvtec))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"limit_train_batches": 0}, r"^limit_train_batches must leave at least one batch to train on, but is 0"),
        ({"limit_train_batches": 0.1}, r"increase the `limit_train_batches` argument"),
        ({"enable_checkpointing": False}, r"`enable_checkpointing=False` but found `ModelCheckpoint`"),
    ],
    ids=str,
)
def test_what_leaves_nothing_to_do_is_refused_by_name(rendered_mvtec, tmp_path, options, named):
    with pytest.raises(Exception, match=named):
        fit(rendered_mvtec, tmp_path, **options)


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_evaluation_is_limited(rendered_mvtec, tmp_path, plain, stage):
    limit = {f"limit_{stage}_batches": 1}
    run = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, **limit)
    found = getattr(run, stage)(plain[0], datamodule=data(rendered_mvtec))
    assert len(found) == 1
    assert sum(getattr(run.trainer, f"num_{stage}_batches")) == 1


def test_profilers_and_loggers_see_the_fit(rendered_mvtec, tmp_path):
    profiler, logger = SimpleProfiler(), CSVLogger(tmp_path)
    fit(rendered_mvtec, tmp_path, profiler=profiler, logger=logger, log_every_n_steps=1)
    assert len(profiler.recorded_durations["run_training_batch"]) == 6
    columns = set((tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(","))
    assert {"train_loss", "train_radius", "image_AUROC", "pixel_AUROC"} <= columns
    assert "score: local" in (tmp_path / "lightning_logs/version_0/hparams.yaml").read_text()


def test_a_compiled_backbone_predicts_the_same_and_the_search_is_left_out_of_what_is_compiled(plain):
    images = noise(2, 64, 64)
    compiled = deepcopy(plain[0]).eval()
    compiled.model.patch_features.compile(backend="aot_eager")  # all of Inductor but the C++
    nearest = torch.compile(compiled.model.memory_bank.nearest, backend="eager")
    with torch.no_grad():
        expected = plain[0].eval()(images)
        torch.testing.assert_close(compiled(images).anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-4)
        descriptors = compiled.model.describe(compiled.model.pyramid(images))
        for ours, theirs in zip(
            nearest(descriptors, 1), compiled.model.memory_bank.nearest(descriptors, 1), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("strategy", "warns"), [("ddp_spawn", True), ("ddp", False)])
def test_a_strategy_of_which_lists_do_not_come_back_is_warned_of(caplog, strategy, warns):
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    trainer.training = True
    check_trainer(trainer)
    assert ("worst_fitting stay empty" in caplog.text) == warns
