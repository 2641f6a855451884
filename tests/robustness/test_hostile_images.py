"""Images of any kind, whole or broken: a clear error or a finite score. A nan never becomes a score."""

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from hypothesis import example, given
from hypothesis import strategies as st
from mutation import mutated
from PIL import Image
from soak import SOAK, cases, count
from tiny import fit_to_noise, noise, tiny_cfa

MODEL = fit_to_noise(tiny_cfa())
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-30, 255.0, 65535.0, 1e10, 3e38, -3e38]
BROKEN = [float("nan"), float("inf"), -float("inf")]
DTYPES = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64]


@torch.no_grad()
def scores(image: torch.Tensor) -> bool:
    """Whether an image is scored, finitely, rather than refused with a message."""
    try:
        found = MODEL(image)
    except Exception as error:
        assert isinstance(error, (ValueError, TypeError, RuntimeError)), repr(error)
        assert str(error)
        return False
    assert found.pred_score.isfinite().all()
    assert found.anomaly_map.isfinite().all()
    assert len(found.pred_score) == len(image)
    return True


@cases(quick=100, soak=2000)
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([0, 1, 2, 3, 3, 3, 4]), st.integers(0, 90), st.integers(0, 90)),
    dtype=st.sampled_from(DTYPES),
    start=st.sampled_from(["noise", *SPECIAL]),
    put=st.lists(st.tuples(st.sampled_from(SPECIAL + BROKEN), st.integers(0, 2**30)), max_size=3),
)
@example(shape=(1, 3, 1, 1), dtype=torch.float32, start=0.5, put=[])
@example(shape=(2, 3, 1, 90), dtype=torch.float32, start=0.0, put=[])
def test_any_tensor_is_refused_or_scored_finitely(shape, dtype, start, put):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)) if start == "noise" else torch.zeros(shape)
    if start != "noise":
        image.fill_(start)
    for value, place in put:
        if image.numel():
            image.view(-1)[place % image.numel()] = value
    image = image.to(dtype)
    scored = scores(image)
    if not image.isfinite().all() or shape[1] not in {1, 3} or 0 in shape[2:]:
        assert not scored
    elif dtype == torch.float32 and image.abs().max() <= 1:
        assert scored or shape[1] != 3


@cases(quick=50, soak=3000)
@given(place=st.integers(0, 3 * 64 * 64 - 1), value=st.sampled_from(BROKEN), which=st.integers(0, 3))
def test_one_broken_pixel_anywhere_refuses_the_batch(place, value, which):
    images = noise(4, 64, 64)
    images[which].view(-1)[place] = value
    with pytest.raises(ValueError, match="finite values only"):
        MODEL(images)


def picture(mode: str, height: int, width: int) -> Image.Image:
    """A random picture of one of Pillow's modes."""
    dice = np.random.default_rng(0)
    if mode == "F":
        return Image.fromarray(dice.random((height, width), dtype=np.float32) * 255, "F")
    if mode.startswith("I"):
        return Image.fromarray(dice.integers(0, 2**16, (height, width), dtype=np.uint16)).convert(mode)
    return Image.fromarray(dice.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def encoded(mode: str, kind: str, height: int = 20, width: int = 30, **options) -> bytes:
    """The same as a file."""
    buffer = io.BytesIO()
    picture(mode, height, width).save(buffer, kind, **options)
    return buffer.getvalue()


KINDS = {
    "colour png": ("RGB", "PNG"),
    "grey png": ("L", "PNG"),
    "grey and alpha png": ("LA", "PNG"),
    "alpha png": ("RGBA", "PNG"),
    "palette png": ("P", "PNG"),
    "black and white png": ("1", "PNG"),
    "16-bit png": ("I;16", "PNG"),
    "jpeg": ("RGB", "JPEG"),
    "grey jpeg": ("L", "JPEG"),
    "cmyk jpeg": ("CMYK", "JPEG"),
    "bmp": ("RGB", "BMP"),
    "gif": ("P", "GIF"),
    "webp": ("RGBA", "WEBP"),
    "tiff": ("RGB", "TIFF"),
    "16-bit tiff": ("I;16", "TIFF"),
    "32-bit tiff": ("I", "TIFF"),
    "float tiff": ("F", "TIFF"),
}


def reads_and_scores(path: Path) -> bool:
    """Whether a file is read as anomalib reads it and scored finitely, rather than refused with a message."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of strange contents
        try:
            image = read_image(path, as_tensor=True)
        except Exception:
            return False
    return scores(image[None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (20, 30)])
def test_every_kind_of_picture_is_scored(tmp_path, kind, size):
    path = tmp_path / "image"
    path.write_bytes(encoded(*KINDS[kind], *size))
    assert reads_and_scores(path)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animated_picture_the_first_frame_is_scored(tmp_path, kind):
    path, still = tmp_path / "animated", tmp_path / "still"
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], **options)
    frames[0].save(still, kind, **options)
    assert reads_and_scores(path)
    assert torch.equal(read_image(path, as_tensor=True), read_image(still, as_tensor=True))


def test_mutated_pictures_are_refused_or_scored_finitely(tmp_path):
    path, read = tmp_path / "image", 0
    contents = [encoded(*kind) for kind in KINDS.values()]
    for seed in range(count(quick=200, soak=10_000)):
        path.write_bytes(mutated(contents[seed % len(contents)], seed))
        read += reads_and_scores(path)
    assert read > 0
    print(f"{read} of {seed + 1} mutated pictures were read and scored")


def test_a_huge_picture_is_scored_and_one_beyond_reason_refused(tmp_path):
    path = tmp_path / "huge.png"
    Image.new("L", (6000, 5000), 100).save(path)
    assert reads_and_scores(path)
    path.write_bytes(b"P5 30000 30000 255\n")
    with pytest.raises(Image.DecompressionBombError):
        read_image(path)


@pytest.mark.skipif(not SOAK, reason="two exports take long: make soak")
def test_what_exported_models_make_of_a_nan(tmp_path):
    """They cannot refuse: ONNX Runtime gives nan and no defect, OpenVINO the highest score or nan."""
    onnxruntime, openvino = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    image = noise(1, 64, 64)
    image[0, 1, 30, 30] = float("nan")
    session = onnxruntime.InferenceSession(MODEL.to_onnx(tmp_path))
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"input": image.numpy()}), strict=True))
    assert np.isnan(found["pred_score"]).all()
    compiled = openvino.compile_model(MODEL.to_openvino(tmp_path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = {next(iter(output.names)): value for output, value in compiled(image.numpy()).items()}
    assert np.isnan(found["pred_score"]).all() or (found["pred_score"] == 1).all()


def test_a_shuffled_batch_is_scored_alike():
    images = noise(6, 50, 70)
    order = random.Random(0).sample(range(6), 6)
    with torch.no_grad():
        torch.testing.assert_close(MODEL(images[order]).pred_score, MODEL(images).pred_score[order])
