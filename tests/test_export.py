import os
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from anomalib.metrics import AUROC
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from anomalib_cfa import Cfa

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

IMAGE_SIZES = [(64, 96), (128, 192), (77, 301)]


def _fit(model: Cfa) -> Cfa:
    """A memory bank and calibration of random images; an export asks for no more."""
    network = model.model.eval()
    height, width = model.input_size
    images = torch.rand(4, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pyramid = network.pyramid(images)
        builder = network.bank_builder()
        builder.update(network.describe(pyramid).flatten(1, 2))
        network.assign_bank(builder.centers())
        network.calibration.restart()
        squared, indices = network.memory_bank.nearest(network.describe(pyramid), 1)
        network.calibration.update(squared[..., 0].sqrt(), indices[..., 0])
        network.calibration.finish()
    post_processor = model.post_processor
    post_processor._image_min, post_processor._image_max = torch.tensor(0.0), torch.tensor(20.0)
    post_processor._pixel_min, post_processor._pixel_max = torch.tensor(0.0), torch.tensor(20.0)
    post_processor._image_threshold, post_processor._pixel_threshold = torch.tensor(9.0), torch.tensor(6.0)
    return model.train()


def _tiny(**arguments) -> Cfa:
    defaults = {"backbone": "test_resnet.r160_in1k", "pre_trained": False, "image_size": [64, 96], "visualizer": False}
    return Cfa(**(defaults | arguments))


@pytest.fixture(scope="module")
def model() -> Cfa:
    return _fit(_tiny())


@pytest.fixture(scope="module")
def openvino_path(model, tmp_path_factory) -> Path:
    return model.to_openvino(tmp_path_factory.mktemp("openvino"))


def _predict(model: Cfa, image: torch.Tensor) -> dict[str, np.ndarray]:
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        output = model.eval()(image)._asdict()
    for module, mode in modes.items():
        module.training = mode
    return {name: value.numpy() for name, value in output.items() if value is not None}


def _run_onnx(path: Path, image: torch.Tensor) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"input": image.numpy()}), strict=True))


def _run_openvino(path: Path, image: torch.Tensor, precision: str = "f32") -> dict[str, np.ndarray]:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return {next(iter(output.names)): value for output, value in compiled(image.numpy()).items()}


def _assert_agree(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].shape == value.shape
        if value.dtype == bool:
            assert (ours[name] != value).mean() < 0.01, name
        else:
            np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_onnx_agrees_for_images_of_any_size_and_number(model, tmp_path):
    path = model.to_onnx(tmp_path)
    assert path == tmp_path / "weights" / "onnx" / "model.onnx"
    assert list(_files(tmp_path)) == ["weights/onnx/model.onnx"]
    for size in IMAGE_SIZES:
        for batch in (1, 3):
            image = torch.rand(batch, 3, *size)
            _assert_agree(_run_onnx(path, image), _predict(model, image))


def test_openvino_agrees_for_images_of_any_size_and_number(model, openvino_path):
    for size in IMAGE_SIZES:
        for batch in (1, 3):
            image = torch.rand(batch, 3, *size)
            _assert_agree(_run_openvino(openvino_path, image), _predict(model, image))


def test_fixed_input_size(model, tmp_path):
    image = torch.rand(2, 3, 100, 75)
    expected = _predict(model, image)
    _assert_agree(_run_onnx(model.to_onnx(tmp_path, input_size=(100, 75)), image), expected)
    _assert_agree(_run_openvino(model.to_openvino(tmp_path, input_size=(100, 75)), image), expected)


def test_centre_crop_and_a_pre_processor_of_ones_own(tmp_path):
    transform = v2.Compose([v2.Resize((80, 112)), v2.CenterCrop((64, 96)), v2.Normalize([0.5] * 3, [0.25] * 3)])
    model = _fit(_tiny(pre_processor=PreProcessor(transform), image_size=None))
    image = torch.rand(1, 3, 200, 150)
    expected = _predict(model, image)
    _assert_agree(_run_onnx(model.to_onnx(tmp_path), image), expected)
    _assert_agree(_run_openvino(model.to_openvino(tmp_path), image), expected)


def test_the_resize_stays_in_float32_where_openvino_would_not(openvino_path):
    import openvino

    compiled = openvino.Core().compile_model(openvino_path, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    precisions = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        for name in info["originalLayersNames"].astype(str).split(","):
            precisions[name] = info["runtimePrecision"].astype(str)
    assert precisions["resize"] == "f32"


def test_inferencers_read_an_image_file(model, openvino_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # anomalib's inferencer leaves a cache in the working folder
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    file = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 201, 3), dtype=np.uint8)).save(file)
    expected = _predict(model, read_image(file, as_tensor=True)[None])
    from_torch = TorchInferencer(model.to_torch(tmp_path), device="cpu").predict(file)
    from_openvino = OpenVINOInferencer(openvino_path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).predict(file)
    for prediction in (from_torch, from_openvino):
        ours = {name: np.asarray(getattr(prediction, name)).reshape(value.shape) for name, value in expected.items()}
        _assert_agree(ours, expected)


def test_exports_leave_no_trace_in_each_other_or_in_the_model(tmp_path):
    model = _fit(_tiny())
    modes = [module.training for module in model.modules()]
    image = torch.rand(1, 3, 90, 90)
    exports = [model.to_onnx, model.to_openvino, model.to_torch]
    first = {export.__name__: export(tmp_path / "first") for export in exports}
    second = {export.__name__: export(tmp_path / "second") for export in reversed(exports)}
    np.testing.assert_equal(_run_onnx(first["to_onnx"], image), _run_onnx(second["to_onnx"], image))
    np.testing.assert_equal(_run_openvino(first["to_openvino"], image), _run_openvino(second["to_openvino"], image))
    assert [module.training for module in model.modules()] == modes
    loss = sum(model.loss(model.model.targets(model.model.pyramid(torch.rand(1, 3, 64, 96)))[0], model.model.radius))
    loss.backward()
    assert model.model.descriptor.weight.grad is not None


@pytest.mark.parametrize("export", ["to_torch", "to_onnx", "to_openvino"])
def test_an_unfitted_model_is_not_exported(export, tmp_path):
    with pytest.raises(RuntimeError, match="must be fitted"):
        getattr(_tiny(), export)(tmp_path)
    assert not _files(tmp_path)


@pytest.mark.parametrize("export", ["to_torch", "to_onnx", "to_openvino"])
def test_a_file_is_replaced_only_by_a_whole_one(model, export, tmp_path, monkeypatch):
    import openvino

    path = getattr(model, export)(tmp_path)
    before = _files(tmp_path)

    def broken(*args, **kwargs):
        target = kwargs.get("f") or args[1]
        Path(target).write_bytes(b"half")
        msg = "disk full"
        raise OSError(msg)

    for module, name in ((torch, "save"), (torch.onnx, "export"), (openvino, "save_model")):
        monkeypatch.setattr(module, name, broken)
    with pytest.raises(OSError, match="disk full"):
        getattr(model, export)(tmp_path)
    assert _files(tmp_path) == before
    monkeypatch.undo()
    os.utime(path, (0, 0))
    assert getattr(model, export)(tmp_path) == path
    assert path.stat().st_mtime > 0
    assert _files(tmp_path).keys() == before.keys()


def _mvtec(root: Path) -> MVTecAD:
    return MVTecAD(root, category="tile", train_batch_size=2, eval_batch_size=2, num_workers=0)


@pytest.mark.parametrize("compression_type", list(CompressionType))
def test_compressed_models_are_smaller_and_agree(model, openvino_path, compression_type, rendered_mvtec, tmp_path):
    if compression_type != CompressionType.FP16:
        pytest.importorskip("nncf")
    path = model.to_openvino(tmp_path, compression_type=compression_type, datamodule=_mvtec(rendered_mvtec))
    assert path.with_suffix(".bin").stat().st_size < openvino_path.with_suffix(".bin").stat().st_size
    image = torch.rand(2, 3, 100, 130)
    ours, expected = _run_openvino(path, image), _predict(model, image)
    assert np.corrcoef(ours["anomaly_map"].ravel(), expected["anomaly_map"].ravel())[0, 1] > 0.98


@pytest.mark.parametrize("compression_type", [CompressionType.INT8_PTQ, CompressionType.INT8_ACQ])
def test_quantization_sees_training_images_only_and_each_as_the_model_does(
    compression_type, model, rendered_mvtec, tmp_path, monkeypatch
):
    nncf = pytest.importorskip("nncf")
    seen = {}

    def quantize(model, calibration, *validation, **options):
        for name, data in zip(("calibration", "validation"), (calibration, *validation), strict=False):
            if isinstance(data, nncf.Dataset):
                seen[name] = list(data.get_inference_data() if name == "calibration" else data.get_data())
        return model

    monkeypatch.setattr(nncf, "quantize", quantize)
    monkeypatch.setattr(nncf, "quantize_with_accuracy_control", quantize)
    datamodule = _mvtec(rendered_mvtec)
    datamodule.setup("fit")
    del datamodule.test_data, datamodule.val_data
    model.to_openvino(tmp_path, input_size=(50, 40), compression_type=compression_type, datamodule=datamodule)
    assert {image.shape for image in seen["calibration"]} == {(1, 3, 50, 40)}
    if compression_type == CompressionType.INT8_ACQ:
        examples = seen["validation"]
        assert {int(example.label) for example in examples} == {0, 1}
        assert {tuple(example.mask.shape[-2:]) for example in examples} == {(64, 96)}
        assert len(examples) + len(seen["calibration"]) == len(datamodule.train_data)


def test_accuracy_control_takes_a_metric_of_ones_own(model, rendered_mvtec, tmp_path):
    pytest.importorskip("nncf")
    metric = AUROC(fields=["anomaly_map", "gt_mask"])
    datamodule = _mvtec(rendered_mvtec)
    model.to_openvino(tmp_path, compression_type="int8_acq", datamodule=datamodule, metric=metric, max_drop=1)
    assert metric.update_called


def test_missing_images_and_wrong_drops_are_named(model, tmp_path):
    for compression_type in (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ):
        with pytest.raises(ValueError, match=r"^datamodule must be given"):
            model.to_openvino(tmp_path, compression_type=compression_type)
    with pytest.raises(ValueError, match=r"^max_drop must be between 0 and 1, but is 2"):
        model.to_openvino(tmp_path, max_drop=2)


def test_a_module_of_another_kind_may_pre_process(tmp_path):
    model = _fit(_tiny())
    model.pre_processor = nn.Identity()
    image = torch.rand(1, 3, 64, 96)
    _assert_agree(_run_openvino(model.to_openvino(tmp_path, input_size=(64, 96)), image), _predict(model, image))
