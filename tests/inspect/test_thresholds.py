"""The thresholds chosen on the page are those that the model has afterwards."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch, MVTecAD
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from PIL import Image
from tiny import fit_to_noise, tiny_cfa
from torchvision.transforms import v2

from anomalib_cfa import Cfa
from anomalib_cfa.inspect.__main__ import main
from anomalib_cfa.inspect.inspection import inspect_samples
from anomalib_cfa.inspect.predictors import ModelPredictor, load_predictor
from anomalib_cfa.inspect.reasons import find_reason
from anomalib_cfa.inspect.samples import find_samples
from anomalib_cfa.inspect.thresholds import main as set_main
from anomalib_cfa.inspect.thresholds import set_thresholds


@pytest.fixture(scope="module")
def trained(rendered_mvtec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model."""
    root = tmp_path_factory.mktemp("trained")
    model = Cfa("resnet18", pre_trained=False, image_size=64, sigma=1.0)
    model.visualizer = None
    engine = Engine(default_root_dir=root, logger=False, accelerator="cpu", devices=1, max_epochs=1)
    engine.fit(model, datamodule=MVTecAD(rendered_mvtec, category="tile", num_workers=0))
    engine.trainer.save_checkpoint(root / "model.ckpt")
    return root / "model.ckpt"


def test_a_checkpoint_and_its_export_call_defective_what_lies_above_the_chosen_threshold(
    trained: Path, rendered_mvtec: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(trained.read_bytes())
    assert set_main([str(checkpoint), "--image", "0.3217", "--pixel", "0.777"]) == 0
    model = Cfa.load_from_checkpoint(checkpoint)
    scores = torch.tensor([0.3216, 0.3217, 0.3218, 0.9])
    threshold = model.post_processor.normalized_image_threshold
    assert threshold == np.float32(1 - np.float32(1 - 0.3217))  # as the page computes it
    model.post_processor.enable_normalization = False
    output = model.post_processor(InferenceBatch(pred_score=scores, anomaly_map=scores[:, None, None]))
    assert output.pred_label.tolist() == [False, bool(scores[1] > threshold), True, True]
    assert output.pred_mask.flatten().tolist() == [False, False, False, True]

    exported = Engine(default_root_dir=tmp_path).export(
        Cfa(pre_trained=False), "openvino", tmp_path, ckpt_path=checkpoint
    )
    image = Image.open(rendered_mvtec / "tile" / "test" / "good" / "000.png").convert("RGB")
    seen = load_predictor(exported).predict(image)
    assert seen.label == (seen.score > 0.3217)
    assert (seen.mask == (seen.anomaly_map > 0.777)).all()
    assert seen.score == pytest.approx(load_predictor(checkpoint).predict(image).score, abs=1e-3)


def test_what_is_not_given_stays(trained: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(trained.read_bytes())
    checkpoint.chmod(0o640)
    link = tmp_path / "link.ckpt"
    link.symlink_to(checkpoint)
    set_thresholds(link, pixel=0.25)
    post_processor = Cfa.load_from_checkpoint(checkpoint).post_processor
    assert (post_processor.image_sensitivity, post_processor.pixel_sensitivity) == (0.5, 0.75)
    assert checkpoint.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.ckpt", "model.ckpt"]


def test_the_worst_patch_is_explained_by_a_training_patch(trained: Path, rendered_mvtec: Path) -> None:
    path = rendered_mvtec / "tile" / "train" / "good" / "003.png"
    reason = load_predictor(trained).predict(Image.open(path).convert("RGB")).reason
    assert reason.normal.parent == path.parent
    assert reason.normal.is_file()
    assert all(0 < part < 1 for part in (*reason.place, *reason.normal_place))
    model = Cfa.load_from_checkpoint(trained)
    assert model.training_images == [str(each) for each in sorted(path.parent.iterdir())]


@pytest.mark.parametrize("score", ["nearest", "softmin", "calibrated", "local"])
def test_the_worst_patch_is_the_one_that_scores_highest(score: str) -> None:
    model = Cfa("resnet18", pre_trained=False, score=score)
    network = model.model.eval()
    generator = torch.Generator().manual_seed(0)
    network.fit([network.pyramid(torch.rand(4, 3, 64, 64, generator=generator))])
    pyramid = network.pyramid(torch.rand(20, 3, 64, 64, generator=generator))
    descriptors = network.describe(pyramid)
    assert find_reason(model, descriptors[0]) is None  # the training images are not known
    model.training_images = [f"{index}.png" for index in range(4)]
    for described, scores in zip(descriptors, network.patch_scores(pyramid)[1], strict=True):
        height, width = scores.shape
        row, column = divmod(int(scores.argmax()), width)
        reason = find_reason(model, described)
        assert reason.place == ((column + 0.5) / width, (row + 0.5) / height)
        _, nearest = network.memory_bank.nearest(described[None], 1)
        assert reason.normal.name == f"{network.memory_bank.sources[nearest[0, row, column, 0], 0]}.png"
    network.memory_bank.assign(network.memory_bank.centers)  # as a bank of means, which has no sources
    assert find_reason(model, descriptors[0]) is None


def test_the_command_writes_a_page(trained: Path, rendered_mvtec: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.html"
    assert main([str(trained), str(rendered_mvtec / "tile"), "--output", str(page), "--embed"]) == 0
    assert f"Open {page}" in capsys.readouterr().out
    assert '"reason"' in page.read_text(encoding="utf-8")
    assert main([str(tmp_path / "no.ckpt"), str(rendered_mvtec)]) == 1
    assert "model must be an existing file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [{"image": 1.5}, {"pixel": -0.1}, {"image": float("nan")}])
def test_thresholds_out_of_range_are_refused(tmp_path: Path, arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be a threshold"):
        set_thresholds(tmp_path / "model.ckpt", **arguments)


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="checkpoint must be one of anomalib"):
        set_thresholds(tmp_path / "model.ckpt", image=0.5)


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("no model", ""):
        (tmp_path / "model.ckpt").write_text(content)
        assert set_main([str(tmp_path / "model.ckpt"), "--image", "0.5"]) == 1
        assert "thresholds: checkpoint must be one of anomalib" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_said_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "padim.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"n_features": 100}, "pytorch-lightning_version": "2.5"}, path)
    with pytest.raises(ValueError, match="model must be a checkpoint of this Cfa") as raised:
        load_predictor(path)
    assert "Cfa has no argument 'n_features'" in str(raised.value.__cause__)


def test_without_a_threshold_no_checkpoint_is_rewritten(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = trained.stat().st_mtime_ns
    with pytest.raises(SystemExit):
        set_main([str(trained)])
    assert "--image or --pixel must be given" in capsys.readouterr().err
    assert trained.stat().st_mtime_ns == before


def test_true_masks_are_not_shown_where_a_pre_processor_moves_pixels(
    rendered_mvtec: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    padded = PreProcessor(v2.Compose([v2.Resize((64, 64)), v2.Pad(8)]))
    predictor = ModelPredictor(fit_to_noise(tiny_cfa(image_size=None, pre_processor=padded)))
    assert predictor.view is None
    assert "neither true masks nor reasons" in caplog.text
    inspection = inspect_samples(predictor, find_samples(rendered_mvtec / "tile"), tmp_path / "page.html", "t", "m")
    assert inspection.images
    assert '"has_mask": true' not in (tmp_path / "page.html").read_text()
