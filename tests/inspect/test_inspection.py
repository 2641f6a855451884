"""What the page is told is what the model said."""

import base64
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from anomalib.data.datasets.image.mvtecad import MVTecADDataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anomalib_cfa.inspect.inspection import Inspection, inspect_samples, report
from anomalib_cfa.inspect.pictures import crop, data_uri, grey_levels, grey_webp, patch_picture
from anomalib_cfa.inspect.predictors import Prediction, load_predictor
from anomalib_cfa.inspect.samples import Sample, find_samples, listed_samples
from anomalib_cfa.inspect.statistics import PixelCounts, Threshold


def told(inspection: Inspection) -> dict:
    html = inspection.page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL).group(1))


def decoded(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition("base64,")[2]))).convert("L"))


def test_each_image_keeps_its_score_kind_and_truth(inspection: Inspection) -> None:
    data = told(inspection)
    assert len(data["images"]) == inspection.images == 70
    by_name = {image["name"]: image for image in data["images"]}
    assert by_name["good/003.png"]["score"] == float(np.float32(69) / np.float32(255))
    assert by_name["good/003.png"]["defective"] is False
    assert not by_name["good/003.png"]["has_mask"]
    assert by_name["scratch/001.png"]["kind"] == "scratch"
    assert by_name["scratch/001.png"]["defective"] is True
    assert by_name["scratch/001.png"]["has_mask"]


def test_thresholds_are_found_from_the_models_verdicts(inspection: Inspection) -> None:
    assert told(inspection)["thresholds"] == {
        "image": pytest.approx(0.6, abs=0.01),
        "pixel": pytest.approx(0.4, abs=0.01),
    }


def test_a_damaged_file_is_listed_and_not_fatal(inspection: Inspection) -> None:
    assert list(inspection.unreadable) == ["hole/damaged.png"]
    assert [file["name"] for file in told(inspection)["unreadable"]] == ["hole/damaged.png"]
    assert any("hole/damaged.png" in line for line in report(inspection))


def test_heat_maps_are_exact_to_a_grey_level(inspection: Inspection, category: Path) -> None:
    image = next(image for image in told(inspection)["images"] if image["name"] == "hole/004.png")
    if "map" in image:
        levels, mask = decoded(image["map"]), decoded(image["mask"])
    else:
        script = (inspection.page.parent / image["map_file"]).read_text()
        levels, mask = map(decoded, re.findall('"(data:[^"]+)"', script))
    expected = np.asarray(Image.open(category / "test" / "hole" / "004.png"))[..., 0]
    assert (levels == expected).all()
    assert (mask > 0).sum() == 10 * 20


def test_embedded_there_is_one_file_and_else_a_folder_beside_it(inspection: Inspection) -> None:
    beside = [path.name for path in inspection.page.parent.iterdir() if path != inspection.page]
    assert beside == ([] if "map" in told(inspection)["images"][0] else ["parts_files"])


def test_no_image_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder must hold images"):
        find_samples(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none can; broken\.png: UnidentifiedImageError"):
        inspect_samples(Fixed(0.5), find_samples(tmp_path), tmp_path / "page.html", "", "")


class Fixed:
    view = (0.0, 0.0, 1.0, 1.0)
    checkpoint = None

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def predict(self, image: Image.Image) -> Prediction:
        score = self.scores.pop(0) if len(self.scores) > 1 else self.scores[0]
        return Prediction(score, np.asarray(image, np.float32)[..., 0] / 255)


def test_names_need_not_be_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "image.png")
    (folder / os.fsdecode(b"broken\xe9.png")).write_bytes(b"no picture")
    found = inspect_samples(Fixed(0.5), find_samples(folder), tmp_path / "page.html", folder.name, "model")
    assert r"caf\udce9" in found.page.read_text(encoding="utf-8")
    assert r"broken\udce9.png" in found.page.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_an_error_before_long_work(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "page").mkdir()
    with pytest.raises(ValueError, match="output must be the path of a page"):
        inspect_samples(Fixed(), find_samples(tmp_path), tmp_path / "page", "", "")
    assert {path.name for path in tmp_path.iterdir()} == {"image.png", "page"}


def test_scores_that_are_not_normalized_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match="model must normalize its scores to 0 to 1"):
        inspect_samples(Fixed(17.0), find_samples(tmp_path), tmp_path / "page.html", "", "")


def test_images_without_labels_are_unlabelled(tmp_path: Path) -> None:
    (tmp_path / "monday").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "monday" / "image.png")
    data = told(inspect_samples(Fixed(0.5), find_samples(tmp_path), tmp_path / "page.html", "", ""))
    assert [(image["defective"], image["folder"]) for image in data["images"]] == [(None, "monday")]
    assert sum(data["pixels"]["unknown"]) == 64
    assert sum(data["pixels"]["normal"]) == 0


def test_a_second_inspection_does_not_take_the_firsts_pictures_for_images(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    for _ in range(2):
        result = inspect_samples(Fixed(0.5), find_samples(tmp_path), tmp_path / "page.html", "", "")
    assert (result.images, result.unreadable) == (1, {})


def test_nor_where_one_path_is_absolute_and_the_other_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("parts").mkdir()
    Image.new("RGB", (8, 8)).save("parts/image.png")
    for _ in range(2):
        result = inspect_samples(Fixed(0.5), find_samples(Path("parts")), tmp_path / "parts" / "page.html", "", "")
    assert (result.images, result.unreadable) == (1, {})


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("scores", [[17.0], [0.25, 17.0]])
def test_an_inspection_that_fails_leaves_the_earlier_page_and_its_pictures(
    tmp_path: Path, embed: bool, scores: list[float]
) -> None:
    for index in range(3):
        Image.new("RGB", (8, 8), (80 * index, 0, 0)).save(tmp_path / f"{index}.png")
    samples, page = find_samples(tmp_path), tmp_path / "page.html"
    inspect_samples(Fixed(0.5), samples, page, "", "")
    before = contents(tmp_path)
    assert len(before) == 3 + 1 + 2 * 3
    with pytest.raises(ValueError, match="model must normalize"):
        inspect_samples(Fixed(*scores), samples[1:], page, "", "", embed)
    assert before.items() <= contents(tmp_path).items()

    result = inspect_samples(Fixed(0.5), samples[:1], page, "", "", embed)  # and one that succeeds removes all of it
    image = told(result)["images"][0]
    shown = set() if embed else {tmp_path / image["picture"], tmp_path / image["map_file"]}
    assert {path for path in contents(tmp_path) if path.suffix != ".png"} == {page} | shown


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "text.ckpt"])
def test_models_are_refused_by_name(tmp_path: Path, name: str) -> None:
    if name != "model.ckpt":
        (tmp_path / name).write_text("no model")
    with pytest.raises(ValueError, match="model must be .*" + re.escape(name)):
        load_predictor(tmp_path / name)


def test_pixels_are_counted_exactly_at_each_threshold() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.random(5000), np.linspace(0, 1, 1001)]).astype(np.float32)[None]
    mask = rng.random(values.shape) < 0.3
    counts = PixelCounts()
    counts.update(values, mask)
    for step in (0, 1, 250, 333, 500, 999, 1000):
        threshold = np.float32(step / 1000)
        for kind, of in (("normal", values[~mask]), ("defective", values[mask])):
            assert counts.counts[kind][step + 1 :].sum() == (of > threshold).sum()


def test_the_default_threshold_is_kept_where_it_agrees() -> None:
    threshold = Threshold()
    threshold.update(np.float32([0.1, 0.9]), np.array([False, True]))
    assert threshold.value == 0.5
    threshold.update(np.float32([0.7]), np.array([False]))
    assert threshold.value == pytest.approx(0.8)


def above(threshold: float, scores: np.ndarray) -> np.ndarray:
    return scores > np.float32(1) - np.float32(1 - threshold)  # as anomalib does


def test_a_threshold_lies_between_the_scores_even_if_they_are_near_each_other() -> None:
    threshold = Threshold()
    threshold.update(np.float32([0.3216, 0.3218]), np.array([False, True]))
    assert threshold.value == 0.3217


@given(
    chosen=st.floats(0, 1),
    others=st.lists(st.floats(0, 1, width=32), max_size=5),
    near=st.lists(st.integers(-3, 3), max_size=3),
)
def test_the_positive_scores_are_exactly_those_above_the_threshold_found(
    chosen: float, others: list[float], near: list[int]
) -> None:
    effective = np.float32(1) - np.float32(1 - chosen)
    steps = np.float32(effective) + np.float32(near) * np.spacing(effective)
    scores = np.concatenate([np.float32(others), steps.astype(np.float32)]).clip(0, 1)
    threshold = Threshold()
    threshold.update(scores, above(chosen, scores))
    assert (above(threshold.value, scores) == above(chosen, scores)).all()


def test_masks_and_pictures_are_of_what_the_model_sees(tmp_path: Path) -> None:
    mask = np.zeros((40, 80), np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    view = (0.5, 0.0, 1.0, 1.0)
    assert Sample(tmp_path, "", mask=tmp_path / "mask.png").read_mask((10, 10), view).all()
    assert crop(Image.fromarray(mask), view).size == (40, 40)


def test_grey_levels_and_patches_hold_their_values() -> None:
    levels = grey_levels(np.float32([[0, 0.5, 1, 2]]))
    assert levels.tolist() == [[0, 128, 255, 255]]
    assert decoded(data_uri(grey_webp(levels))).tolist() == levels.tolist()
    image = Image.new("RGB", (64, 64))
    image.paste((255, 255, 255), (48, 48, 64, 64))
    assert np.asarray(Image.open(io.BytesIO(patch_picture(image, (0.99, 0.99))))).min() > 250


def test_an_anomalib_data_set_lists_what_its_folder_holds(rendered_mvtec: Path) -> None:
    samples = MVTecADDataset(rendered_mvtec, "tile", split="test").samples
    assert listed_samples(samples) == find_samples(rendered_mvtec / "tile")
