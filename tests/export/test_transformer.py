import pytest
import torch
from exporting import assert_agree, fitted, predict, run_onnx, run_openvino, tiny

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")


# The position embedding is of 10 x 10 patches: it shrinks, stays, and grows along one side alone.
@pytest.mark.parametrize("image_size", [[96, 128], [160, 160], [144, 192]])
def test_a_transformer_agrees(image_size, tmp_path):
    model = fitted(tiny(backbone="test_vit.r160_in1k", image_size=image_size))
    onnx_path, openvino_path = model.to_onnx(tmp_path), model.to_openvino(tmp_path)
    for size, batch in (((90, 75), 1), ((200, 201), 2)):
        image = torch.rand(batch, 3, *size)
        expected = predict(model, image)
        assert_agree(run_onnx(onnx_path, image), expected)
        assert_agree(run_openvino(openvino_path, image), expected)


def test_a_transformer_of_fixed_input_size_agrees(tmp_path):
    model = fitted(tiny(backbone="test_vit.r160_in1k", image_size=[96, 128]))
    image = torch.rand(1, 3, 100, 75)
    expected = predict(model, image)
    assert_agree(run_onnx(model.to_onnx(tmp_path, input_size=(100, 75)), image), expected)
    assert_agree(run_openvino(model.to_openvino(tmp_path, input_size=(100, 75)), image), expected)


def test_openvino_computes_a_transformer_nearly_in_float32_where_it_would_not(tmp_path):
    # It moves the scaling of the queries, and the marks are lost: attention alone is left in bfloat16.
    path = fitted(tiny(backbone="test_vit.r160_in1k", image_size=[96, 128])).to_openvino(tmp_path)
    image = torch.rand(1, 3, 200, 201)
    low, full = (run_openvino(path, image, precision) for precision in ("bf16", "f32"))
    assert_agree(low, full, tolerance=1e-2)
