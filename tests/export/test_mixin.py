from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from anomalib.metrics import AUROC
from anomalib.pre_processing import PreProcessor
from exporting import assert_agree, fitted, predict, run_onnx, run_openvino, tiny
from PIL import Image
from soak import SOAK
from torch import nn
from torchvision.transforms import v2

from anomalib_cfa import Cfa
from anomalib_cfa.export.openvino import operations

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

OTHER_SIZE = (50, 40)
IMAGE_SIZES = [(32, 48), (64, 96), (128, 192), (256, 384), (77, 301)]  # 0.5, 1, 2 and 4 times the model's, and odd


@pytest.fixture
def exported_once(onnx_once, monkeypatch) -> None:
    """Lets OpenVINO exports of one model start from one ONNX file, where a test is of what follows."""
    monkeypatch.setattr(Cfa, "to_onnx", onnx_once)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_onnx_is_one_file(onnx_path):
    assert list(_files(onnx_path.parents[2])) == ["weights/onnx/model.onnx"]


def test_the_exporters_own_log_does_not_bury_the_result(onnx_path, exporters_log):
    assert not [record.getMessage() for record in exporters_log if record.name.startswith("onnx")]


def test_onnx_agrees_for_images_of_any_size_and_number(model, onnx_path):
    for size in IMAGE_SIZES:
        for batch in (1, 3):
            image = torch.rand(batch, 3, *size)
            assert_agree(run_onnx(onnx_path, image), predict(model, image))


def test_openvino_agrees_for_images_of_any_size_and_number(model, openvino_path):
    for size in IMAGE_SIZES:
        for batch in (1, 3):
            image = torch.rand(batch, 3, *size)
            assert_agree(run_openvino(openvino_path, image), predict(model, image))


@pytest.mark.usefixtures("exported_once")
def test_openvino_computes_nothing_but_ones_in_bfloat16(model, tmp_path, monkeypatch):
    """Of the loop's body, as what a loop holds cannot be looked into once it is compiled."""
    import openvino

    monkeypatch.setattr("anomalib_cfa.export.loops.one_image_of_any_size_at_a_time", lambda model: model)
    path = model.to_openvino(tmp_path)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    low = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        kind, precision = (node.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision"))
        if precision == "bf16" and kind != "Reorder":
            low.append(node.get_friendly_name())
    assert all("ones_like" in name for name in low), low


def test_both_views_are_exported(tmp_path):
    model = fitted(tiny(center_view=True))
    path = model.to_openvino(tmp_path)
    for size in IMAGE_SIZES:
        image = torch.rand(2, 3, *size)
        assert_agree(run_openvino(path, image), predict(model, image))
    network, image = model.model.eval(), torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        both = network(image).anomaly_map
        network.center_view = False
        assert not torch.allclose(network(image).anomaly_map, both, rtol=1e-2)


@pytest.mark.skipif(not SOAK, reason="one more export of both views: make soak")
def test_both_views_are_exported_behind_a_pre_processor_of_another_kind(tmp_path):
    model = fitted(tiny(center_view=True))
    model.pre_processor = nn.Identity()
    image = torch.rand(1, 3, 128, 72)
    assert_agree(run_openvino(model.to_openvino(tmp_path, input_size=(128, 72)), image), predict(model, image))


@pytest.mark.usefixtures("exported_once")
def test_fixed_input_size(model, tmp_path):
    image = torch.rand(2, 3, *OTHER_SIZE)
    assert_agree(run_openvino(model.to_openvino(tmp_path, input_size=OTHER_SIZE), image), predict(model, image))


def test_centre_crop_and_a_pre_processor_of_ones_own(tmp_path):
    transform = v2.Compose([v2.Resize((80, 112)), v2.CenterCrop((64, 96)), v2.Normalize([0.5] * 3, [0.25] * 3)])
    model = fitted(tiny(pre_processor=PreProcessor(transform), image_size=None))
    image = torch.rand(1, 3, 200, 150)
    assert_agree(run_openvino(model.to_openvino(tmp_path), image), predict(model, image))


@pytest.fixture(scope="module")
def unclamped() -> Cfa:
    """The same model, but that its normalized scores are not clamped, whatever the precision makes of them."""
    model = fitted(tiny(), images=28)
    model.post_processor.pixel_max.add_(1000)
    return model


def assert_smaller_and_alike(path: Path, whole: Path, model: Cfa) -> None:
    """Of a compressed export: that it is smaller than the whole one, and that its maps are nearly the model's."""
    assert path.with_suffix(".bin").stat().st_size < whole.with_suffix(".bin").stat().st_size
    image = torch.rand(2, 3, 100, 130)
    ours, expected = (output["anomaly_map"].ravel() for output in (run_openvino(path, image), predict(model, image)))
    assert np.corrcoef(ours, expected)[0, 1] > 0.98


def test_openvino_computes_in_float32_where_it_would_not(openvino_path):
    image = torch.rand(2, 3, 150, 101)
    low, full = (run_openvino(openvino_path, image, precision) for precision in ("bf16", "f32"))
    assert_agree(low, full, tolerance=1e-6)


@pytest.mark.usefixtures("exported_once")
def test_half_precision_leaves_the_backbone_alone_to_openvino(unclamped, openvino_path, tmp_path):
    import openvino

    path = unclamped.to_openvino(tmp_path, compression_type=CompressionType.FP16)
    assert_smaller_and_alike(path, openvino_path, unclamped)
    read = openvino.Core().read_model(path)
    [loop] = [node for node in operations(read) if node.get_type_name() == "TensorIterator"]
    inside = operations(loop.get_function())
    free = {node.get_type_name() for node in inside if "DisablePrecisionConversion_0" not in node.get_rt_info()}
    assert "Convolution" in free
    assert not free & {"TopK", "MatMul"}


def test_behind_the_resize_openvino_knows_all_sizes(openvino_path):
    import openvino

    whole = operations(openvino.Core().read_model(openvino_path))
    [loop] = [node for node in whole if node.get_type_name() == "TensorIterator"]  # over the batch
    rankings = [node for node in operations(loop.get_function()) if node.get_type_name() == "TopK"]
    assert rankings
    assert all(value.get_partial_shape().is_static for node in rankings for value in node.inputs())


def test_inferencers_read_an_image_file(model, openvino_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # anomalib's inferencer leaves a cache in the working folder
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    file = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 201, 3), dtype=np.uint8)).save(file)
    expected = predict(model, read_image(file, as_tensor=True)[None])
    from_torch = TorchInferencer(model.to_torch(tmp_path), device="cpu").predict(file)
    from_openvino = OpenVINOInferencer(openvino_path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).predict(file)
    for prediction in (from_torch, from_openvino):
        ours = {name: np.asarray(getattr(prediction, name)).reshape(value.shape) for name, value in expected.items()}
        assert_agree(ours, expected)


def test_thresholds_and_normalization_survive(model, openvino_path, two_labels):
    labels = set()
    for image in two_labels:
        ours, expected = run_openvino(openvino_path, image), predict(model, image)
        assert bool(ours["pred_label"][0]) == bool(expected["pred_label"][0])
        assert_agree(ours, expected)
        labels.add(bool(ours["pred_label"][0]))
    assert labels == {False, True}


def test_exports_leave_no_trace_in_each_other_or_in_the_model(model, onnx_path, openvino_path, tmp_path):
    modes = [module.training for module in model.modules()]
    model.to_torch(tmp_path)
    again = model.to_onnx(tmp_path)
    image = torch.rand(1, 3, 90, 90)
    np.testing.assert_equal(run_onnx(again, image), run_onnx(onnx_path, image))
    assert_agree(run_openvino(openvino_path, image), predict(model, image))  # exported after the first ONNX file
    assert [module.training for module in model.modules()] == modes
    loss = sum(model.loss(model.model.targets(model.model.pyramid(torch.rand(1, 3, 64, 96)))[0], model.model.radius))
    loss.backward()
    assert model.model.descriptor.weight.grad is not None
    model.zero_grad()


@pytest.mark.parametrize("export", ["to_torch", "to_onnx", "to_openvino"])
def test_an_unfitted_model_is_not_exported(export, tmp_path):
    with pytest.raises(RuntimeError, match="must be fitted"):
        getattr(tiny(), export)(tmp_path)
    assert not _files(tmp_path)


@pytest.mark.parametrize("export", ["to_torch", "to_onnx", "to_openvino"])
def test_a_file_is_replaced_only_by_a_whole_one(model, onnx_once, export, tmp_path, monkeypatch):
    import openvino

    kind, suffixes = {
        "to_torch": ("torch", [".pt"]),
        "to_onnx": ("onnx", [".onnx"]),
        "to_openvino": ("openvino", [".xml", ".bin"]),
    }[export]
    folder = tmp_path / "weights" / kind
    folder.mkdir(parents=True)
    for suffix in suffixes:
        (folder / f"model{suffix}").write_text("of an earlier export")
    before = _files(tmp_path)

    def broken(*args, **kwargs):
        target = kwargs.get("f") or args[1]
        Path(target).write_bytes(b"half")
        msg = "disk full"
        raise OSError(msg)

    if export == "to_openvino":
        monkeypatch.setattr(Cfa, "to_onnx", onnx_once)
    with monkeypatch.context() as patch:
        writers = {
            "to_torch": (torch, "save"),
            "to_onnx": (torch.onnx, "export"),
            "to_openvino": (openvino, "save_model"),
        }
        patch.setattr(*writers[export], broken)
        with pytest.raises(OSError, match="disk full"):
            getattr(model, export)(tmp_path)
    assert _files(tmp_path) == before
    if export == "to_onnx":  # what the exporter itself would write is not looked at
        monkeypatch.setattr(torch.onnx, "export", lambda *_, f, **__: Path(f).write_bytes(b"whole"))
    assert getattr(model, export)(tmp_path) == folder / f"model{suffixes[0]}"
    after = _files(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)


def _mvtec(root: Path) -> MVTecAD:
    return MVTecAD(root, category="tile", train_batch_size=2, eval_batch_size=2, num_workers=0)


@pytest.mark.usefixtures("exported_once")
@pytest.mark.parametrize("compression_type", [CompressionType.INT8, CompressionType.INT8_PTQ, CompressionType.INT8_ACQ])
def test_compressed_models_are_smaller_and_agree(unclamped, openvino_path, compression_type, rendered_mvtec, tmp_path):
    pytest.importorskip("nncf")
    path = unclamped.to_openvino(tmp_path, compression_type=compression_type, datamodule=_mvtec(rendered_mvtec))
    assert_smaller_and_alike(path, openvino_path, unclamped)


@pytest.mark.usefixtures("exported_once")
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
    if compression_type == CompressionType.INT8_ACQ:  # the fewest that it takes
        datamodule.train_data = datamodule.train_data.subsample([0, 1, 2, 3])
    del datamodule.test_data, datamodule.val_data
    model.to_openvino(tmp_path, input_size=OTHER_SIZE, compression_type=compression_type, datamodule=datamodule)
    assert {image.shape for image in seen["calibration"]} == {(1, 3, *OTHER_SIZE)}
    if compression_type == CompressionType.INT8_ACQ:
        examples = seen["validation"]
        assert {int(example.gt_label) for example in examples} == {0, 1}
        assert {tuple(example.gt_mask.shape[-2:]) for example in examples} == {(64, 96)}
        assert len(examples) + len(seen["calibration"]) == len(datamodule.train_data)


@pytest.mark.usefixtures("exported_once")
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
    for max_drop in (2, None):
        with pytest.raises(ValueError, match=rf"^max_drop must be a number from 0 to 1, but is {max_drop}"):
            model.to_openvino(tmp_path, max_drop=max_drop)


@pytest.mark.parametrize("export", ["to_onnx", "to_openvino"])
@pytest.mark.parametrize("input_size", [64, (64,), (0, 64), (64.0, 64), ("64", "64")], ids=str)
def test_a_wrong_input_size_is_named_before_anything_is_written(model, export, input_size, tmp_path):
    with pytest.raises(ValueError, match=r"^input_size must be None or a pair of positive integers"):
        getattr(model, export)(tmp_path, input_size=input_size)
    assert not list(tmp_path.iterdir())


def test_accuracy_control_needs_a_normal_and_a_defective_image_to_judge_by(model, rendered_mvtec, tmp_path):
    datamodule = _mvtec(rendered_mvtec)
    datamodule.setup("fit")
    datamodule.train_data = datamodule.train_data.subsample([0, 1, 2])
    with pytest.raises(ValueError, match=r"^datamodule must hold at least 4 training images .*, but holds 3"):
        model.to_openvino(tmp_path, compression_type="int8_acq", datamodule=datamodule)


def test_a_model_without_a_threshold_is_warned_of(model, tmp_path, caplog, monkeypatch):
    for name in ("_image_threshold", "_pixel_threshold"):
        monkeypatch.setattr(model.post_processor, name, torch.tensor(torch.nan))
    model.to_torch(tmp_path)
    assert caplog.text.count("The model has no threshold") == 1
