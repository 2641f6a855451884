"""What a GPU computes is what the CPU computes, in every step from the fit to the export."""

import copy
from pathlib import Path

import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import TorchInferencer
from PIL import Image
from tiny import engine, fit_to_noise, mvtec, noise, tiny_cfa

from anomalib_cfa import Cfa
from anomalib_cfa.bank.memory_bank import MemoryBank
from anomalib_cfa.bank.search import SEARCH_KINDS
from anomalib_cfa.inspect.predictors import load_predictor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """PyTorch rounds the inputs of a GPU's convolutions to TensorFloat-32 unless it is told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def predicted(model, images):
    with torch.inference_mode():
        prediction = model(images)
    return prediction.pred_score.cpu(), prediction.anomaly_map.cpu()


def assert_agree(ours, theirs, tolerance=1e-4):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.fixture(scope="module")
def trained(rendered_mvtec, tmp_path_factory):
    """A model trained on the GPU with features kept there, and its checkpoint."""
    model, run = tiny_cfa(), engine(tmp_path_factory.mktemp("trained"), accelerator="gpu", max_epochs=2)
    run.fit(model, datamodule=mvtec(rendered_mvtec))
    return model, run.best_model_path


@pytest.mark.parametrize("kind", SEARCH_KINDS)
def test_the_search_finds_the_same_centres(kind):
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(4096, 96, generator=generator)
    queries = torch.randn(2, 30, 31, 96, generator=generator)
    found = {}
    for device in ("cpu", "cuda"):
        bank = MemoryBank(kind).to(device)
        bank.assign(centers.to(device))
        found[device] = [part.cpu() for part in bank.nearest(queries.to(device), 6)]
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], rtol=1e-4, atol=1e-4)
    assert (found["cuda"][1] == found["cpu"][1]).float().mean() > 0.999


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"search": "exact", "score": "softmin"},
        {"bank": "mean", "score": "nearest"},
        {"bank": "ema", "whitening": None, "score": "calibrated"},
        {"center_view": True},
    ],
    ids=str,
)
def test_a_model_fitted_on_the_gpu_scores_like_itself_on_the_cpu(options):
    model = fit_on_gpu(tiny_cfa(**options))
    images = noise(3, 64, 64, seed=2)
    on_gpu = predicted(model.model, images.cuda())
    assert_agree(on_gpu, predicted(model.model.cpu(), images))


def fit_on_gpu(model):
    network = model.model.cuda().eval()
    network.fit([network.pyramid(noise(4, 64, 64).cuda())])
    return model.cuda().eval()


def test_a_model_fitted_on_the_gpu_scores_like_one_fitted_on_the_cpu():
    """Though the descriptor may start turned or mirrored, as an eigenvector's sign is anybody's."""
    on_gpu, on_cpu = fit_on_gpu(tiny_cfa(bank="mean")), fit_to_noise(tiny_cfa(bank="mean"))
    images = noise(3, 64, 64, seed=2)
    assert_agree(predicted(on_gpu.model, images.cuda()), predicted(on_cpu.model, images), tolerance=1e-2)


def test_a_training_step_has_the_gradients_of_the_cpu():
    model = fit_to_noise(tiny_cfa(radius=0.5))
    gradients = {}
    for device in ("cpu", "cuda"):
        network = copy.deepcopy(model.model).to(device)
        squared, _, _ = network.targets(network.pyramid(noise(2, 64, 64, seed=3).to(device)))
        sum(model.loss(squared, network.radius)).backward()
        gradients[device] = [parameter.grad.cpu() for parameter in network.trained_parameters()]
    assert_agree(gradients["cuda"], gradients["cpu"], tolerance=1e-3)


def test_a_checkpoint_of_the_gpu_predicts_alike_on_the_cpu(trained, rendered_mvtec, tmp_path):
    model, checkpoint = trained
    scores = {}
    for accelerator in ("gpu", "cpu"):
        batches = engine(tmp_path, accelerator=accelerator).predict(
            Cfa.load_from_checkpoint(checkpoint, map_location="cpu"),
            datamodule=mvtec(rendered_mvtec),
            return_predictions=True,
        )
        scores[accelerator] = (
            torch.cat([batch.pred_score for batch in batches]).cpu(),
            torch.cat([batch.anomaly_map for batch in batches]).cpu(),
        )
    assert_agree(scores["gpu"], scores["cpu"], tolerance=1e-3)
    assert model.post_processor.image_threshold.isfinite()


def test_thresholds_come_from_normal_images(rendered_mvtec, tmp_path):
    model, run = tiny_cfa(), engine(tmp_path, accelerator="gpu", limit_val_batches=0)
    run.fit(model, datamodule=mvtec(rendered_mvtec))
    assert model.post_processor.image_threshold.isfinite()
    (metrics,) = run.test(model, datamodule=mvtec(rendered_mvtec))
    assert 0 <= metrics["image_AUROC"] <= 1


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_half_precision_trains(precision, rendered_mvtec, tmp_path):
    model = tiny_cfa()
    engine(tmp_path, accelerator="gpu", precision=precision).fit(model, datamodule=mvtec(rendered_mvtec))
    assert all(parameter.isfinite().all() for parameter in model.model.trained_parameters())


def test_training_goes_on_from_a_checkpoint_of_the_cpu(rendered_mvtec, tmp_path):
    first = engine(tmp_path / "cpu", max_epochs=1)
    first.fit(tiny_cfa(), datamodule=mvtec(rendered_mvtec))
    second, model = engine(tmp_path / "gpu", accelerator="gpu", max_epochs=2), tiny_cfa()
    second.fit(model, datamodule=mvtec(rendered_mvtec), ckpt_path=first.best_model_path)
    assert second.trainer.current_epoch == 2
    assert model.model.memory_bank.is_built


def test_exports_of_a_model_on_the_gpu_agree_with_it(trained, rendered_mvtec, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = trained[0].cuda().eval()
    path = min((rendered_mvtec / "tile/test").rglob("*.png"))
    image = read_image(path, as_tensor=True)[None]
    expected = predicted(model, image.cuda())
    exported = model.to_onnx(tmp_path)
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, map(torch.from_numpy, session.run(None, {"input": image.numpy()})), strict=True))
    assert_agree((outputs["pred_score"], outputs["anomaly_map"]), expected, tolerance=1e-3)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    prediction = TorchInferencer(model.to_torch(tmp_path), device="cuda").predict(path)
    assert_agree((prediction.pred_score.cpu(), prediction.anomaly_map.cpu()), expected, tolerance=1e-3)
    assert next(model.parameters()).is_cuda


def test_the_inspection_predicts_on_the_gpu(trained, rendered_mvtec):
    paths = sorted((rendered_mvtec / "tile/test").rglob("*.png"))[:3]
    predictions = []
    for device in ("cuda", "cpu"):
        predictor = load_predictor(Path(trained[1]), device)
        predictions.append([predictor.predict(Image.open(path).convert("RGB")) for path in paths])
    for ours, theirs in zip(*predictions, strict=True):
        assert ours.score == pytest.approx(theirs.score, rel=1e-3)
