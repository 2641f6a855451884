"""Checkpoints of released versions, made by ``make_checkpoint.py``, load and score as they did."""

import json
from pathlib import Path

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from make_checkpoint import FOLDER, predictions
from packaging.version import Version

import anomalib_cfa
from anomalib_cfa import Cfa

KEPT = sorted(FOLDER.glob("*.ckpt"))


def test_there_is_one_of_the_oldest_version_and_each_is_small():
    assert Version(KEPT[0].stem) <= Version(anomalib_cfa.__version__)
    assert all(path.stat().st_size < 300_000 for path in KEPT)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_kept_checkpoint_loads_and_scores_as_it_did(path: Path):
    found = predictions(Cfa.load_from_checkpoint(path, map_location="cpu"))
    for name, expected in json.loads(path.with_suffix(".json").read_text()).items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_fit_goes_on_from_a_kept_checkpoint(path: Path, rendered_mvtec: Path, tmp_path: Path):
    model = Cfa.load_from_checkpoint(path, map_location="cpu")
    datamodule = MVTecAD(rendered_mvtec, category="tile", train_batch_size=2, eval_batch_size=4, num_workers=0)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    engine = Engine(default_root_dir=tmp_path, max_epochs=3, **options)
    engine.fit(model, datamodule=datamodule, ckpt_path=path)
    assert engine.trainer.current_epoch == 3
    (optimizer,) = engine.trainer.optimizers
    assert {int(state["step"]) for state in optimizer.state.values()} == {9}  # six images in twos, three times
