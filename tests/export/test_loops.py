"""Exports take images of any size, in memory that does not grow with the sizes seen."""

import copy
import gc
from itertools import product

import numpy as np
import pytest
import torch
from anomalib.pre_processing import PreProcessor
from soak import count
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms import InterpolationMode, v2

from anomalib_cfa.export.loops import leading_resize, one_image_of_any_size_at_a_time
from anomalib_cfa.export.openvino import keep_float32, operations
from anomalib_cfa.pre_processing import configure_pre_processor, make_exportable


def exportable(*parts):
    pre_processor = PreProcessor(v2.Compose(list(parts)))
    make_exportable(pre_processor)
    return pre_processor


@pytest.mark.parametrize(
    ("pre_processor", "size"),
    [
        (configure_pre_processor((64, 96)), (64, 96)),
        (configure_pre_processor((64, 96), (32, 32)), (64, 96)),
        (exportable(v2.Compose([v2.Resize((40, 50))]), v2.CenterCrop(20)), (40, 50)),
        (exportable(v2.CenterCrop(20), v2.Resize((40, 50))), None),
        (exportable(v2.Resize(40)), None),
        (exportable(v2.Resize((40, 50), interpolation=InterpolationMode.BICUBIC)), None),
        (exportable(v2.Resize((40, 50), antialias=False)), None),
        (None, None),
    ],
    ids=str,
)
def test_the_resize_that_comes_first_is_found(pre_processor, size):
    assert leading_resize(pre_processor) == size


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_strips_add_up_to_the_resize(precision, tmp_path):
    openvino = pytest.importorskip("openvino")
    opset = openvino.opset13
    images = opset.parameter([-1, 3, 60, 90], np.float32, name="input")
    images.output(0).set_names({"input"})
    resized = opset.result(opset.add(images, np.float32(0)))
    resized.output(0).set_names({"resized"})
    model = openvino.Model([resized], [images])
    keep_float32(operations(model))
    openvino.save_model(one_image_of_any_size_at_a_time(model), tmp_path / "model.xml", compress_to_fp16=False)
    compiled = openvino.Core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": precision})
    for size in ((60, 90), (64, 128), (1, 1), (63, 65), (129, 700), (1000, 30)):
        image = torch.rand(2, 3, *size)
        expected = F.interpolate(image, (60, 90), mode="bilinear", antialias=True)
        torch.testing.assert_close(torch.from_numpy(compiled(image.numpy())["resized"]), expected, rtol=0, atol=2e-5)


def in_openvino(request):
    openvino = pytest.importorskip("openvino")
    return openvino.Core().compile_model(request.getfixturevalue("openvino_path"), "CPU")


def in_onnx_runtime(request):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(request.getfixturevalue("onnx_path"))
    return lambda image: session.run(None, {"input": image})


def in_pytorch(request):
    model = copy.deepcopy(request.getfixturevalue("model")).eval()
    return torch.no_grad()(lambda image: model(torch.from_numpy(image)))


@pytest.mark.parametrize("runtime", [in_openvino, in_onnx_runtime, in_pytorch])
def test_memory_does_not_grow_with_the_sizes_seen(runtime, request, resident_bytes):
    predict = runtime(request)
    sizes = list(product(range(20, 420, 4), repeat=2))
    np.random.default_rng(0).shuffle(sizes)

    def run(number):
        for height, width in sizes[:number]:
            predict(np.full((1, 3, height, width), 0.5, np.float32))
        del sizes[:number]
        gc.collect()

    predict(np.full((1, 3, 420, 420), 0.5, np.float32))
    run(40)
    before = resident_bytes()
    number = count(quick=60, soak=9000)
    run(number)
    grown = resident_bytes() - before
    print(f"{number} sizes {runtime.__name__}: {grown / 2**20:+.1f} MiB")
    assert grown < 50 * 2**20  # a mebibyte for each of the quick form's 60 sizes was what it took before
