"""A model that is cheap and whose scores are known, and its page."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_cfa.inspect.inspection import Inspection, inspect_samples
from anomalib_cfa.inspect.predictors import Prediction
from anomalib_cfa.inspect.reasons import Reason
from anomalib_cfa.inspect.samples import find_samples


class Brightness:
    """Scores a pixel by its red, and an image by its brightest pixel; its thresholds are 0.6 and 0.4."""

    view = (0.0, 0.0, 1.0, 1.0)
    checkpoint: Path | None = Path("a model's/model.ckpt")

    def __init__(self, normal: Path) -> None:
        self.normal = normal

    def predict(self, image: Image.Image) -> Prediction:
        scores = np.asarray(image, dtype=np.float32)[..., 0] / np.float32(255)
        reason = Reason((0.5, 0.5), self.normal, (0.25, 0.75))
        return Prediction(float(scores.max()), scores, bool(scores.max() > 0.6), scores > 0.4, reason)


def _save(path: Path, spots: list[tuple[slice, slice, int]]) -> None:
    pixels = np.full((48, 64, 3), 20, np.uint8)
    for rows, columns, level in spots:
        pixels[rows, columns] = level
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def category(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A category in MVTec AD's layout: 40 normal and 30 defective images, and a damaged one."""
    root = tmp_path_factory.mktemp("inspect") / "<b>parts"
    for index in range(40):
        _save(root / "test" / "good" / f"{index:03}.png", [(slice(4, 8), slice(4, 8), 60 + 3 * index)])
    for index in range(30):
        kind = ("hole", "scratch")[index % 2]
        large, small = (slice(10, 20), slice(10, 30)), (slice(30, 34), slice(40, 44))
        _save(root / "test" / kind / f"{index:03}.png", [(*large, 100 + 5 * index), (*small, 90 + 4 * index)])
        mask = np.zeros((48, 64), np.uint8)
        mask[large] = 255
        truth = root / "ground_truth" / kind / f"{index:03}_mask.png"
        truth.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(truth)
    (root / "test" / "hole" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return root


@pytest.fixture(scope="session", params=[False, True], ids=["beside", "embedded"])
def inspection(request: pytest.FixtureRequest, category: Path, tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    page = tmp_path_factory.mktemp("a page's folder #1") / "parts.html"
    predictor = Brightness(category / "test" / "good" / "000.png")
    samples = find_samples(category)
    return inspect_samples(predictor, samples, page, "<b>parts", "</script>model", embed=request.param)
