"""A checkpoint says everything about the model that it holds."""

import copy
import json
import logging
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.data import MVTecAD
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from exporting import assert_agree, predict, run_onnx, run_openvino
from soak import SOAK
from tiny import engine, fit_to_noise, mvtec, noise, tiny_cfa
from torchvision.transforms import v2

from anomalib_cfa import Cfa
from anomalib_cfa.post_processing import OneClassPostProcessor
from anomalib_cfa.training.checkpoints import check_checkpoint

TRAINED = {
    "backbone": "test_resnet.r160_in1k",
    "pre_trained": False,
    "visualizer": False,
    "image_size": 96,
    "layers": ["layer1", "layer2"],
    "score": "softmin",
    "sigma": 2.0,
    "center_view": True,
    "gamma_c": 4,
    "gamma_d": 2,
    "learn_radius": False,
    "lr": 1e-3,
}
# What the constructor is called with by a user who names nothing else.
NOTHING = {"visualizer": False}
# The same but for the backbone, where it does not matter: the default one takes a second to build.
LITTLE = NOTHING | {"backbone": TRAINED["backbone"]}


@pytest.fixture(scope="module")
def trained(rendered_mvtec, tmp_path_factory):
    """A model with no argument at its default, and its checkpoint."""
    model = Cfa(**TRAINED)
    run = engine(tmp_path_factory.mktemp("trained"))
    run.fit(model, datamodule=mvtec(rendered_mvtec))
    return model.eval(), run.trainer.checkpoint_callback.last_model_path or run.best_model_path


@pytest.fixture(scope="module")
def expected(trained, rendered_mvtec, tmp_path_factory):
    """What the trained model predicts."""
    return predicted(trained[0], rendered_mvtec, tmp_path_factory.mktemp("expected"))


def predicted(model, root, folder, **source):
    batches = engine(folder).predict(model, datamodule=mvtec(root), **source)
    return [torch.cat([getattr(batch, name) for batch in batches]) for name in ("pred_score", "anomaly_map")]


def test_a_model_of_which_nothing_is_named_becomes_the_trained_one(trained, expected, rendered_mvtec, tmp_path, caplog):
    model, path = trained
    restored = Cfa(**NOTHING)
    caplog.set_level(logging.INFO, logger="anomalib_cfa")
    for ours, theirs in zip(predicted(restored, rendered_mvtec, tmp_path, ckpt_path=path), expected, strict=True):
        assert torch.equal(ours, theirs)  # also: the images were resized once, as in training
    assert dict(restored.hparams) == dict(model.hparams)
    assert restored.input_size == (96, 96)
    assert re.search(r"From the checkpoint: backbone 'test_resnet.r160_in1k', .*image_size 96", caplog.text)


def test_an_export_to_onnx_is_of_the_trained_model(trained, tmp_path, monkeypatch):
    exported = []
    monkeypatch.setattr(torch.onnx, "export", lambda model, f, **_: exported.append(model) or Path(f).touch())
    engine(tmp_path).export(Cfa(**LITTLE), "onnx", export_root=tmp_path, ckpt_path=trained[1])
    image = noise(1, 90, 75)
    assert_agree(predict(exported[0], image), predict(trained[0], image), tolerance=0)


@pytest.mark.skipif(not SOAK, reason="an export as test_docs.py makes one, and one that it goes through: make soak")
@pytest.mark.parametrize("export_type", ["onnx", "openvino"])
def test_an_export_needs_nothing_but_the_checkpoint(trained, tmp_path, export_type):
    pytest.importorskip("onnxruntime" if export_type == "onnx" else "openvino")
    model, path = trained
    exported = engine(tmp_path).export(Cfa(**NOTHING), export_type, export_root=tmp_path, ckpt_path=path)
    image = noise(1, 90, 75)
    run = run_onnx if export_type == "onnx" else run_openvino
    assert_agree(run(exported, image), predict(model.eval(), image))


def test_test_and_validation_of_it_give_the_same_metrics(trained, rendered_mvtec, tmp_path):
    model, path = trained
    expected = engine(tmp_path).test(model, datamodule=mvtec(rendered_mvtec), verbose=False)
    assert engine(tmp_path).test(Cfa(**NOTHING), datamodule=mvtec(rendered_mvtec), ckpt_path=path) == expected


def test_load_from_checkpoint_and_every_export_are_the_trained_model(trained, tmp_path):
    model, path = trained
    images = noise(2, 80, 70)
    expected = model(images)
    restored = Cfa.load_from_checkpoint(path).eval()
    assert torch.equal(restored(images).anomaly_map, expected.anomaly_map)
    file = engine(tmp_path).export(Cfa(**NOTHING), "torch", tmp_path, ckpt_path=path)
    assert torch.equal(torch.load(file, weights_only=False)["model"](images).anomaly_map, expected.anomaly_map)


def test_a_fit_goes_on_from_it(trained, rendered_mvtec, tmp_path):
    resumed = Cfa(**NOTHING)
    engine(tmp_path, max_epochs=2).fit(resumed, datamodule=mvtec(rendered_mvtec), ckpt_path=trained[1])
    assert resumed.model.score == "softmin"
    assert not torch.equal(resumed.model.descriptor.weight, trained[0].model.descriptor.weight)


def test_an_argument_that_contradicts_is_named_with_what_to_type(trained, rendered_mvtec, tmp_path):
    contradicting = {
        "backbone": "test_efficientnet.r160_in1k",
        "layers": ["layer3"],
        "score": "nearest",
        "sigma": 3.0,
        "gamma_c": 2,
        "gamma_d": 3,
        "image_size": 64,
        "center_crop_size": 64,
        "num_nearest_neighbors": 2,
        "bank": "mean",
        "whitening": None,
        "search": "exact",
    }
    run, datamodule = engine(tmp_path), mvtec(rendered_mvtec)
    for name, value in contradicting.items():
        with pytest.raises(ValueError, match=f"^{name} must be .* but is ") as raised:
            run.predict(Cfa(**(LITTLE | {name: value})), datamodule=datamodule, ckpt_path=trained[1])
        message = str(raised.value)
        assert repr(value) in message
        (typed,) = shlex.split(message.partition(f"--model.{name} ")[2])
        assert yaml.safe_load(typed) == trained[0].hparams[name]
        with pytest.raises(ValueError, match=f"^{name} must be "):
            Cfa.load_from_checkpoint(trained[1], **{name: value})


def test_a_fit_that_goes_on_keeps_what_its_optimizer_holds(trained, rendered_mvtec, tmp_path):
    model = Cfa(**LITTLE, lr=0.5)
    with pytest.raises(ValueError, match=r"^lr must be 0\.001"):
        engine(tmp_path, max_epochs=2).fit(model, datamodule=mvtec(rendered_mvtec), ckpt_path=trained[1])
    predicted(Cfa(**LITTLE, lr=0.5), rendered_mvtec, tmp_path, ckpt_path=trained[1])


@pytest.mark.parametrize(
    "same",
    [
        {"backbone": "test_resnet"},
        {"layers": ("layer2", "layer1")},
        {"image_size": [96, 96]},
        {"pre_processor": PreProcessor(v2.Compose([v2.Resize((96, 96)), v2.Normalize([0.5] * 3, [0.5] * 3)]))},
        {"feature_budget": 0.5, "seed": 3, "alpha": 0.2},
        {"evaluator": False},
    ],
)
def test_other_names_of_the_same_and_what_may_change_are_accepted(trained, expected, rendered_mvtec, tmp_path, same):
    ours = predicted(Cfa(**(LITTLE | same)), rendered_mvtec, tmp_path, ckpt_path=trained[1])
    assert all(map(torch.equal, ours, expected))


def test_another_pre_processor_is_refused(trained, rendered_mvtec, tmp_path):
    other = PreProcessor(v2.Compose([v2.Resize((64, 64)), v2.Normalize([0.5] * 3, [0.5] * 3)]))
    for pre_processor in (other, False):
        with pytest.raises(ValueError, match=r"^pre_processor must be .*Resize \[96, 96\]"):
            predicted(Cfa(**LITTLE, pre_processor=pre_processor), rendered_mvtec, tmp_path, ckpt_path=trained[1])


def test_without_a_post_processor_scores_are_as_they_are(trained, expected, rendered_mvtec, tmp_path):
    model = Cfa(**LITTLE, post_processor=False)
    scores, _ = predicted(model, rendered_mvtec, tmp_path, ckpt_path=trained[1])
    normalized, _ = expected
    assert torch.equal(scores.argsort(), normalized.argsort()) or scores.max() > 1


def test_a_component_that_the_model_was_trained_without_does_not_run(rendered_mvtec, tmp_path):
    model = Cfa(**(TRAINED | {"post_processor": False}))
    run = engine(tmp_path / "fit")
    run.fit(model, datamodule=mvtec(rendered_mvtec))
    expected, _ = predicted(model, rendered_mvtec, tmp_path)
    scores, _ = predicted(Cfa(**NOTHING), rendered_mvtec, tmp_path, ckpt_path=run.best_model_path)
    assert torch.equal(scores, expected)


def test_a_checkpoint_leaves_nothing_to_the_next_one(trained, expected, rendered_mvtec, tmp_path):
    """Neither the components that its model was trained without, nor arguments of which the next one says nothing."""
    bare = Cfa(**TRAINED | {"pre_processor": False, "post_processor": False, "image_size": None, "sigma": 4.0})
    run = engine(tmp_path / "bare")
    run.fit(bare, datamodule=MVTecAD(rendered_mvtec, "tile", train_batch_size=2, num_workers=0))
    judged = Cfa(**NOTHING)
    predicted(judged, rendered_mvtec, tmp_path, ckpt_path=run.best_model_path)
    assert judged.pre_processor is None
    assert judged.post_processor is None
    again = engine(tmp_path)
    metrics = again.test(judged, datamodule=mvtec(rendered_mvtec), ckpt_path=trained[1], verbose=False)
    assert metrics == engine(tmp_path).test(trained[0], datamodule=mvtec(rendered_mvtec), verbose=False)
    kinds = [type(callback) for callback in again.trainer.callbacks]
    assert kinds.index(PreProcessor) < kinds.index(OneClassPostProcessor) < kinds.index(Evaluator)

    old = Path(__file__).parents[1] / "checkpoints/0.1.0.ckpt"
    fresh = Cfa(**NOTHING)
    for model in (judged, fresh):
        predicted(model, rendered_mvtec, tmp_path, ckpt_path=old)
    assert not judged.model.center_view
    assert dict(judged.hparams) == dict(fresh.hparams)


def test_a_checkpoint_that_lacks_a_tensor_leaves_no_model_that_is_half_another(trained, rendered_mvtec, tmp_path):
    model = copy.deepcopy(trained[0])
    checkpoint = torch.load(trained[1], weights_only=True)
    del checkpoint["state_dict"]["model.descriptor.weight"]
    torch.save(checkpoint, tmp_path / "lacking.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.* \"model.descriptor.weight\""):
        engine(tmp_path).test(model, datamodule=mvtec(rendered_mvtec), ckpt_path=tmp_path / "lacking.ckpt")
    with pytest.raises(RuntimeError, match="memory bank is not built"):
        predicted(model, rendered_mvtec, tmp_path)


def test_what_was_changed_in_load_from_checkpoint_stays_so(trained, rendered_mvtec, tmp_path):
    restored = Cfa.load_from_checkpoint(trained[1], feature_budget=0.25)
    engine(tmp_path, max_epochs=2).fit(restored, datamodule=mvtec(rendered_mvtec), ckpt_path=trained[1])
    assert restored.hparams["feature_budget"] == 0.25


def test_what_may_change_changes_in_load_from_checkpoint(trained):
    restored = Cfa.load_from_checkpoint(trained[1], feature_budget=0.25, image_size=[96, 96], alpha=0.3, seed=5)
    assert restored.hparams["feature_budget"] == 0.25
    assert (restored.loss.alpha, restored.model.seed) == (0.3, 5)
    with pytest.raises(ValueError, match=r"^feature_budget must be a number of GiB"):
        Cfa.load_from_checkpoint(trained[1], feature_budget=-1)


def test_a_command_line_needs_nothing_but_the_checkpoint(trained, rendered_mvtec, tmp_path, capsys):
    options = f"--ckpt_path {trained[1]} --data MVTecAD --data.root {rendered_mvtec} --data.category tile"
    options += f" --data.num_workers 0 --trainer.accelerator cpu --default_root_dir {tmp_path}"
    AnomalibCLI(["test", "--model", "Cfa", "--model.visualizer", "false", *options.split()])
    assert "image_AUROC" in capsys.readouterr().out


def test_a_checkpoint_of_0_1_0_predicts_as_it_did(rendered_mvtec, tmp_path):
    folder = Path(__file__).parents[1] / "checkpoints"
    recorded = json.loads((folder / "0.1.0.json").read_text())
    images = noise(3, 80, 60, 7)
    through_trainer, run = Cfa(**NOTHING), engine(tmp_path)
    with pytest.warns(FutureWarning, match="search 'ivf' is called 'two_level' now"):
        run.predict(through_trainer, datamodule=mvtec(rendered_mvtec), ckpt_path=folder / "0.1.0.ckpt")
    with pytest.warns(FutureWarning, match="descriptor_start is part of whitening now"):
        loaded = Cfa.load_from_checkpoint(folder / "0.1.0.ckpt")
    for model in (loaded.eval(), through_trainer.eval()):
        assert model.hparams["score"] == "calibrated"
        with torch.no_grad():
            before, after = model.model(model.pre_processor(images)), model(images)
        assert before.pred_score.tolist() == pytest.approx(recorded["score"], rel=1e-4)
        torch.testing.assert_close(
            after.anomaly_map[0, ::8, ::8], torch.tensor(recorded["normalized_map"]), rtol=0, atol=1e-4
        )


def test_labels_without_a_threshold_are_warned_of(rendered_mvtec, tmp_path, caplog):
    model = Cfa(**TRAINED, post_processor=PostProcessor())
    engine(tmp_path, limit_val_batches=0).fit(model, datamodule=mvtec(rendered_mvtec))
    with caplog.at_level(logging.WARNING, logger="anomalib_cfa"):
        predicted(model, rendered_mvtec, tmp_path)
    assert "no threshold" in caplog.text


@pytest.mark.parametrize(
    "trainer", [{"precision": "bf16-true"}, {"precision": "64-true"}, {"limit_train_batches": 0}], ids=str
)
def test_a_trainer_that_cannot_work_is_refused_by_its_argument(rendered_mvtec, tmp_path, trainer):
    with pytest.raises(ValueError, match=f"^{next(iter(trainer))} must "):
        engine(tmp_path, **trainer).fit(Cfa(**TRAINED), datamodule=mvtec(rendered_mvtec))


def test_validation_and_test_of_the_same_images_agree(rendered_mvtec, tmp_path):
    datamodule = MVTecAD(rendered_mvtec, category="tile", train_batch_size=2, num_workers=0)  # test images in both
    model = Cfa(**(TRAINED | {"score": "calibrated"}))
    run = engine(tmp_path)
    run.fit(model, datamodule=datamodule)
    (validated,) = run.validate(model, datamodule=datamodule, verbose=False)
    (tested,) = run.test(model, datamodule=datamodule, verbose=False)
    for name in ("image_AUROC", "pixel_AUROC"):
        assert validated[name] == pytest.approx(tested[name], abs=1e-3)


@pytest.mark.parametrize("shape", [(3, 3), (0, 2), (8,)])
def test_sources_that_do_not_fit_the_centres_are_refused(shape):
    state = fit_to_noise(tiny_cfa()).state_dict()
    check_checkpoint({"state_dict": state})
    state["model.memory_bank.sources"] = torch.zeros(shape, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"memory_bank\.sources must have shape \(0, 3\) or \(\d+, 3\), but has"):
        check_checkpoint({"state_dict": state})


def test_a_pre_processor_that_cannot_be_saved_must_be_given_again(rendered_mvtec, tmp_path):
    """Without it images would reach the backbone neither resized nor normalized."""
    blurred = PreProcessor(v2.Compose([v2.Resize((64, 64), antialias=True), v2.GaussianBlur(3)]))
    model = tiny_cfa(image_size=None, pre_processor=blurred)
    run = engine(tmp_path)
    run.fit(model, datamodule=mvtec(rendered_mvtec))
    run.trainer.save_checkpoint(tmp_path / "model.ckpt")
    for load in (
        lambda: Cfa.load_from_checkpoint(tmp_path / "model.ckpt"),
        lambda: engine(tmp_path).test(Cfa(**LITTLE), mvtec(rendered_mvtec), ckpt_path=tmp_path / "model.ckpt"),
        lambda: engine(tmp_path).export(Cfa(**LITTLE), "onnx", ckpt_path=tmp_path / "model.ckpt"),
    ):
        with pytest.raises(ValueError, match=r"pre_processor must be given beside this checkpoint.*GaussianBlur"):
            load()
    again = Cfa.load_from_checkpoint(tmp_path / "model.ckpt", pre_processor=blurred).eval()
    image = noise(1, 80, 80)
    assert torch.equal(again(image).pred_score, model.eval()(image).pred_score)


@pytest.mark.parametrize("trained_with", [True, False])
def test_a_post_processor_that_is_given_keeps_its_settings(trained, rendered_mvtec, tmp_path, trained_with):
    model, checkpoint = trained
    if not trained_with:
        model = tiny_cfa(post_processor=False)
        run = engine(tmp_path)
        run.fit(model, datamodule=mvtec(rendered_mvtec))
        checkpoint = run.trainer.checkpoint_callback.last_model_path or run.best_model_path
    given = PostProcessor(image_sensitivity=0.9)
    tested = Cfa(**LITTLE, post_processor=given)
    engine(tmp_path).test(tested, mvtec(rendered_mvtec), ckpt_path=checkpoint)
    for restored in (tested, Cfa.load_from_checkpoint(checkpoint, post_processor=PostProcessor(image_sensitivity=0.9))):
        assert restored.post_processor.image_sensitivity == 0.9
        if trained_with:
            assert restored.post_processor.image_threshold == model.post_processor.image_threshold
        else:
            assert restored.post_processor.image_threshold.isnan()


@pytest.mark.parametrize("layers", [["layer2", "layer3.0"], ["layer2.0", "layer3"]])
def test_stages_and_single_blocks_are_restored(layers):
    """A stage goes by its last block's name in such a network."""
    model = fit_to_noise(tiny_cfa(layers=layers))
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    for given in ({}, {"layers": layers}, {"layers": list(model.model.patch_features.layers)}):
        restored = Cfa(**LITTLE, **given)
        restored.on_load_checkpoint(copy.deepcopy(checkpoint))
        assert restored.model.patch_features.layers == model.model.patch_features.layers
    with pytest.raises(ValueError, match="layers must be"):
        Cfa(**LITTLE, layers=["layer3"]).on_load_checkpoint(copy.deepcopy(checkpoint))


class Inverting(PreProcessor):
    """A user's own."""

    def forward(self, batch):
        return super().forward(1 - batch)


def test_a_pre_processor_of_ones_own_class_must_be_given_again():
    given = Inverting(v2.Compose([v2.Resize((64, 64), antialias=True)]))
    model = fit_to_noise(tiny_cfa(image_size=None, pre_processor=given))
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"pre_processor must be given beside this checkpoint.*with, Inverting"):
        Cfa(**LITTLE).on_load_checkpoint(copy.deepcopy(checkpoint))
    restored = Cfa(**LITTLE, pre_processor=given)
    restored.on_load_checkpoint(copy.deepcopy(checkpoint))
    assert type(restored.pre_processor) is Inverting


def test_a_post_processor_beside_a_checkpoint_of_another_false_alarm_rate(rendered_mvtec, tmp_path):
    run = engine(tmp_path)
    run.fit(tiny_cfa(false_alarm_rate=0.05), datamodule=mvtec(rendered_mvtec))
    run.trainer.save_checkpoint(tmp_path / "model.ckpt")
    given = OneClassPostProcessor(0.02)
    restored = Cfa.load_from_checkpoint(tmp_path / "model.ckpt", post_processor=given)
    assert restored.post_processor.false_alarm_rate == 0.02
    assert Cfa.load_from_checkpoint(tmp_path / "model.ckpt", post_processor=False).post_processor is None
