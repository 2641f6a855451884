"""The rendered data set is what anomalib's ``MVTecAD`` expects, and the demo runs to its end without any weights."""

import hashlib
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from anomalib.cli import AnomalibCLI
from anomalib.data import MVTecAD
from hypothesis import given, settings
from hypothesis import strategies as st
from soak import SOAK

from anomalib_cfa.demo import commands
from anomalib_cfa.demo.__main__ import main
from anomalib_cfa.demo.render import CATEGORIES, render_mvtec
from anomalib_cfa.demo.weights import Weights

RANDOM = Weights("test_resnet.r160_in1k", None, "No ImageNet weights.")


@pytest.mark.parametrize("category", CATEGORIES)
def test_anomalib_reads_the_rendered_images(rendered_mvtec: Path, category: str) -> None:
    datamodule = MVTecAD(rendered_mvtec, category=category, train_batch_size=2, eval_batch_size=2, num_workers=0)
    datamodule.setup()
    assert len(datamodule.train_data) == 6
    test = datamodule.test_data.samples
    assert len(test) == 2 + 3 * 2
    assert set(test["label"]) == {"good", *CATEGORIES[category].defects}
    for item in datamodule.test_data:
        assert item.image.shape == (3, 64, 64)
        assert bool(item.gt_label) == bool(item.gt_mask.any())


@pytest.mark.parametrize("category", CATEGORIES)
def test_masks_are_0_or_255_and_cover_what_changed(rendered_mvtec: Path, category: str) -> None:
    for path in (rendered_mvtec / category / "ground_truth").rglob("*_mask.png"):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert mask.shape == (64, 64)
        assert set(np.unique(mask)) == {0, 255}


@settings(max_examples=60)
@given(
    name=st.sampled_from([(name, kind) for name, category in CATEGORIES.items() for kind in category.defects]),
    seed=st.integers(0, 2**32),
    size=st.sampled_from([32, 64, 100]),
)
def test_a_defect_changes_the_picture_within_its_mask(name: tuple[str, str], seed: int, size: int) -> None:
    category, rng = CATEGORIES[name[0]], np.random.default_rng(seed)
    scene = category.normal(rng, size)
    picture, mask = category.defects[name[1]](rng, scene)
    change = np.abs(picture - scene.picture).max(axis=-1)
    assert 0 < mask.mean() < 0.4
    assert change[mask].mean() > 5 * change[~mask].mean()


def _contents(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_seed_fixes_every_file_and_a_larger_set_holds_the_smaller(tmp_path: Path) -> None:
    small = {"categories": ["metal_nut"], "num_train": 2, "num_good": 1, "num_defective": 1, "image_size": 48}
    first = _contents(render_mvtec(tmp_path / "a", seed=3, **small))
    assert first == _contents(render_mvtec(tmp_path / "b", seed=3, **small))
    larger = _contents(render_mvtec(tmp_path / "c", seed=3, **small | {"num_train": 3, "categories": list(CATEGORIES)}))
    assert first.items() <= larger.items()
    other = _contents(render_mvtec(tmp_path / "d", seed=4, **small))
    assert not set(first.values()) & set(other.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"categories": ["tile", "bolt"]}, "categories must be among ['metal_nut', 'tile'], but got ['bolt']"),
        ({"num_train": 0}, "num_train must be at least 1, but got 0"),
        ({"image_size": 31}, "image_size must be at least 32, but got 31"),
        ({"seed": -1}, "seed must be at least 0, but got -1"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        render_mvtec(tmp_path / "data", **wrong)
    assert not (tmp_path / "data").exists()


def test_the_demo_ends_with_metrics_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("anomalib_cfa.demo.__main__.find_weights", lambda *_: RANDOM)
    tiny = {"num_train": 4, "num_good": 1, "num_defective": 1, "image_size": 64}
    monkeypatch.setattr(
        "anomalib_cfa.demo.__main__.render_mvtec", lambda root, names, seed: render_mvtec(root, names, seed, **tiny)
    )
    in_a_process = commands._anomalib

    def anomalib(subcommand: str, arguments: list[str], log: Path) -> None:
        # A new process imports for longer than all else takes: in the quick form one command has one.
        if SOAK or subcommand == "train":
            in_a_process(subcommand, arguments, log)
        else:
            AnomalibCLI([subcommand, *arguments])

    monkeypatch.setattr(commands, "_anomalib", anomalib)
    status = main(["--output", str(tmp_path), "--categories", "tile", "--epochs", "1"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "No ImageNet weights" in printed.out
    values = re.search(r"^tile +(.+)$", printed.out, flags=re.MULTILINE)
    assert values
    assert all(0 <= float(value) <= 1 for value in values[1].split())
    assert f"open {os.path.relpath(tmp_path / 'inspection_tile.html')}" in printed.out
    assert (tmp_path / "inspection_tile.html").is_file()
    pictures = sorted(path.name for path in (tmp_path / "heat_maps").glob("*.png"))
    assert pictures == [f"tile_{kind}_000.png" for kind in ("crack", "good", "gray_stroke", "oil")]


def test_a_failing_command_is_told_with_the_end_of_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = tmp_path / "anomalib"
    failing.write_text("#!/bin/sh\necho what went wrong\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr("anomalib_cfa.demo.commands.shutil.which", lambda *_, **__: str(failing))
    monkeypatch.setattr("anomalib_cfa.demo.__main__.find_weights", lambda *_: RANDOM)
    monkeypatch.setattr("anomalib_cfa.demo.__main__.render_mvtec", lambda root, *_: root)
    assert main(["--output", str(tmp_path), "--categories", "tile"]) == 1
    message = capsys.readouterr().err
    assert "`anomalib train` failed with exit status 3" in message
    assert "what went wrong" in message
