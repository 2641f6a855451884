import pytest
import torch
from exporting import assert_agree, fitted, predict, run_onnx, run_openvino, tiny
from soak import SOAK

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")


BACKBONE = "test_vit.r160_in1k"


@pytest.fixture(scope="module")
def model():
    """A transformer, its position embedding of 10 x 10 patches shrunk."""
    return fitted(tiny(backbone=BACKBONE, image_size=[96, 128]))


@pytest.fixture(scope="module")
def openvino_path(model, tmp_path_factory):
    return model.to_openvino(tmp_path_factory.mktemp("openvino"))


def assert_agrees_at_any_size(run, path, model):
    for size, batch in (((90, 75), 1), ((200, 201), 2)):
        image = torch.rand(batch, 3, *size)
        assert_agree(run(path, image), predict(model, image))


@pytest.mark.skipif(not SOAK, reason="one more export, which OpenVINO's goes through: make soak")
def test_a_transformer_agrees_in_onnx(model, tmp_path):
    assert_agrees_at_any_size(run_onnx, model.to_onnx(tmp_path), model)


def test_a_transformer_agrees_in_openvino(model, openvino_path):
    assert_agrees_at_any_size(run_openvino, openvino_path, model)


@pytest.mark.skipif(not SOAK, reason="one more export: make soak")
def test_a_transformer_whose_position_embedding_grows_along_one_side_agrees(tmp_path):
    model = fitted(tiny(backbone=BACKBONE, image_size=[144, 192]))
    assert_agrees_at_any_size(run_openvino, model.to_openvino(tmp_path), model)


@pytest.mark.skipif(not SOAK, reason="one more export, as OpenVINO's is of a fixed size behind its resize: make soak")
def test_a_transformer_of_fixed_input_size_agrees(model, tmp_path):
    image = torch.rand(1, 3, 100, 75)
    assert_agree(run_openvino(model.to_openvino(tmp_path, input_size=(100, 75)), image), predict(model, image))


def test_openvino_computes_a_transformer_nearly_in_float32_where_it_would_not(openvino_path):
    # It moves the scaling of the queries, and the marks are lost: attention alone is left in bfloat16.
    image = torch.rand(1, 3, 200, 201)
    low, full = (run_openvino(openvino_path, image, precision) for precision in ("bf16", "f32"))
    assert_agree(low, full, tolerance=1e-2)
