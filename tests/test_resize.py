from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from soak import SOAK
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F  # noqa: N812
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as v2_functional

from anomalib_cfa.pre_processing import exportable_transform
from anomalib_cfa.resize import _KERNELS, ExportableResize, cache_by_size, resize_weights

SIZES = st.integers(1, 300)
# Of a target of 64 x 64: 0.5x, 1x, 2x, 4x, odd ratios both ways, and one axis at a time.
IMAGE_SIZES = [(32, 32), (64, 64), (128, 128), (256, 256), (63, 65), (75, 417), (64, 200)]


@given(size=SIZES, new_size=SIZES, mode=st.sampled_from(list(_KERNELS)))
def test_weights_resize_as_torch_does(size: int, new_size: int, mode: tuple[InterpolationMode, bool]) -> None:
    # In float64, where torch's own rounding is out of the way.
    signal = torch.rand(1, 1, size, 2, dtype=torch.float64)
    interpolation, antialias = mode
    expected = F.interpolate(signal, (new_size, 2), mode=interpolation.value, antialias=antialias, align_corners=False)
    weights = resize_weights(size, new_size, _KERNELS[mode], antialias, dtype=torch.float64)
    torch.testing.assert_close(weights @ signal, expected, rtol=0, atol=1e-6)


@given(size=SIZES)
def test_weights_of_the_same_size_are_the_identity(size: int) -> None:
    for (_, antialias), kernel in _KERNELS.items():
        assert torch.equal(resize_weights(size, size, kernel, antialias), torch.eye(size))


def test_weights_in_half_precision_do_not_overflow() -> None:
    weights = resize_weights(4096, 256, dtype=torch.float16)
    assert weights.dtype == torch.float16
    torch.testing.assert_close(weights.float(), resize_weights(4096, 256), rtol=1e-3, atol=1e-4)


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    size=st.none() | st.integers(1, 600),
    max_size=st.none() | st.integers(601, 1300),
)
def test_output_size_is_torchvisions(height: int, width: int, size: int | None, max_size: int | None) -> None:
    if size is None and max_size is None:
        size = 1
    resized = ExportableResize(size, max_size=max_size).output_size(height, width)
    assume(min(resized) > 0)  # torchvision refuses to make such an image
    image = torch.empty(1, height, width, device="meta")
    assert v2_functional.resize(image, None if size is None else [size], max_size=max_size).shape[1:] == resized


@pytest.mark.parametrize("interpolation", ["bilinear", InterpolationMode.BICUBIC, 2, "nearest"])
def test_outside_of_a_graph_it_is_torchvisions_resize(interpolation: Any) -> None:
    plain = v2.Resize((64, 48), interpolation=interpolation)
    exportable = ExportableResize((64, 48), interpolation=interpolation)
    image = tv_tensors.Image(torch.rand(3, 100, 130))
    mask = tv_tensors.Mask(torch.rand(100, 130) > 0.5)
    try:
        expected = plain(image, mask)
    except ValueError:
        assert isinstance(interpolation, str)
        pytest.skip("this torchvision takes no interpolation by its name")
    for ours, theirs in zip(exportable(image, mask), expected, strict=True):
        assert type(ours) is type(theirs)
        assert torch.equal(ours, theirs)
    grey = torch.randint(0, 256, (3, 100, 130), dtype=torch.uint8)
    assert torch.equal(exportable(grey), plain(grey))


class _Model(nn.Module):
    """Pre-processors' transforms side by side as a graph; the convolution stands for the backbone behind each."""

    def __init__(self, *transforms: v2.Transform) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(map(exportable_transform, transforms))
        self.backbone = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        images = [transform(image) for transform in self.transforms]
        return *images, *map(self.backbone, images)


def _export(path: Path, *transforms: v2.Transform, size: tuple[int, int] | None = None) -> Path:
    pytest.importorskip("onnxscript")
    axes = {0: torch.export.Dim("batch_size")}
    if size is None:
        axes |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    torch.onnx.export(
        _Model(*transforms).eval(),
        (torch.rand(2, 3, *(size or (40, 50))),),
        str(path),
        input_names=["input"],
        dynamic_shapes=(axes,),
        dynamo=True,
        verbose=False,
    )
    return path


NORMALIZE = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
# Transforms, and how far an exported one may be off.
TRANSFORMS: dict[str, tuple[v2.Transform, float]] = {
    "resize": (v2.Compose([v2.Resize((64, 64)), NORMALIZE]), 2e-6),
    # Torch's own rounding of pixel positions shows where the size is no power of two.
    "crop": (v2.Compose([v2.Compose([v2.Resize((56, 72))]), v2.CenterCrop(48), NORMALIZE]), 1e-4),
    "shorter-side": (v2.Compose([v2.Resize(64), v2.CenterCrop((48, 32))]), 2e-5),
    "no-antialias": (v2.Resize((64, 64), antialias=False), 2e-6),
    "bicubic": (v2.Resize((64, 64), interpolation=InterpolationMode.BICUBIC), 2e-6),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One graph with all of them, whose outputs have their order: an export takes seconds."""
    return _export(tmp_path_factory.mktemp("exported") / "model.onnx", *(each for each, _ in TRANSFORMS.values()))


def _assert_agrees(run: Any, transform: v2.Transform, tolerance: float) -> None:
    for size in IMAGE_SIZES:
        for batch in (1, 3):
            image = torch.rand(batch, 3, *size)
            expected = transform(image)
            torch.testing.assert_close(torch.as_tensor(run(image.numpy())), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_onnx_resizes_any_image_as_tested(name: str, exported: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(exported)
    output = session.get_outputs()[list(TRANSFORMS).index(name)].name
    _assert_agrees(lambda image: session.run([output], {"input": image})[0], *TRANSFORMS[name])


@pytest.mark.skipif(not SOAK, reason="an export of so many unknown sizes takes long: make soak")
def test_onnx_keeps_the_longer_side_within_its_limit(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    transform = v2.Resize(64, max_size=100)
    session = onnxruntime.InferenceSession(_export(tmp_path / "model.onnx", transform))
    _assert_agrees(lambda image: session.run(None, {"input": image})[0], transform, 2e-5)


def test_openvino_resizes_any_image_as_tested_in_any_precision(exported: Path) -> None:
    openvino = pytest.importorskip("openvino")
    transform, place = TRANSFORMS["resize"][0], list(TRANSFORMS).index("resize")
    # A pixel has a range of 4.4 after normalization; bfloat16 rounds it to 1/256, but must not move it elsewhere.
    for precision, tolerance in (("f32", 3e-6), ("bf16", 0.1)):
        compiled = openvino.compile_model(exported, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        _assert_agrees(lambda image, model=compiled: model(image)[place], transform, tolerance)


def test_openvino_resizes_a_large_image_bicubically(exported: Path) -> None:
    openvino = pytest.importorskip("openvino")
    transform, place = TRANSFORMS["bicubic"][0], list(TRANSFORMS).index("bicubic")
    image = np.random.default_rng(0).random((1, 3, 1500, 1100), dtype=np.float32)
    for precision, tolerance in (("f32", 2e-6), ("bf16", 0.02)):
        compiled = openvino.compile_model(exported, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        resized = torch.as_tensor(compiled(image)[place])
        torch.testing.assert_close(resized, transform(torch.from_numpy(image)), rtol=0, atol=tolerance)


def test_a_fixed_input_of_the_right_size_is_not_resized(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(_export(tmp_path / "model.onnx", v2.Resize((64, 48)), size=(64, 48))).graph
    assert {node.op_type for node in graph.node} <= {"Conv", "Identity"}


def test_fixed_input_of_another_size(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    transform = v2.Resize((64, 48))
    session = onnxruntime.InferenceSession(_export(tmp_path / "model.onnx", transform, size=(100, 75)))
    image = np.random.default_rng(0).random((2, 3, 100, 75), dtype=np.float32)
    resized = torch.as_tensor(session.run(None, {"input": image})[0])
    torch.testing.assert_close(resized, transform(torch.from_numpy(image)), rtol=0, atol=2e-5)


def test_weights_are_cached_whatever_mode_they_were_first_asked_for_in():
    calls = []

    @cache_by_size
    def weights(size):
        calls.append(size)
        return torch.arange(size, dtype=torch.float32)

    like = torch.zeros(1)
    with FakeTensorMode() as mode:
        assert isinstance(weights(5, like=mode.from_tensor(like)), FakeTensor)
    with torch.device("meta"):
        assert weights(5, like=like).tolist() == [0, 1, 2, 3, 4]
    assert weights(5, like=like) is weights(5, like=like)
    assert len(calls) == 2
