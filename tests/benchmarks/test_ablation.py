import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ablation
import ablation_run
import held_out
import synthetic_defects
import variants
from ablation_run import CosineSchedule, carry_out, fit
from ablation_table import markdown
from feature_cache import FeatureCache
from variants import GROUPS, Variant

from anomalib_cfa import Cfa

TINY = {"backbone": "test_resnet.r160_in1k", "gamma_c": 1}


@given(st.sets(st.integers(0, 10**6), min_size=50, max_size=200), st.integers(0, 9))
def test_the_folds_part_the_images(numbers, fold):
    images = [Path(f"exp_{number}.png") for number in numbers]
    training, validation = held_out.split(images, fold)
    assert sorted(training + validation) == sorted(images)
    # Where its borders move, a run of neighbours may lose all but one image, or become twice as long.
    assert 5 <= len(validation) <= 0.4 * len(images) + 5
    others = [set(held_out.split(images, other)[1]) for other in range(held_out.FOLDS)]
    assert set.union(*others) == set(images)
    assert sum(map(len, others)) == len(images)


@given(st.integers(50, 800), st.integers(1, 100), st.integers(0, 9))
def test_a_fold_of_evenly_numbered_images_is_about_a_fifth(count, step, fold):
    images = [Path(f"exp_{step * number}.png") for number in range(count)]
    _, validation = held_out.split(images, fold)
    assert 0.1 < len(validation) / count < 0.3


def test_photographs_of_one_object_stay_on_one_side():
    images = [Path(f"exp{shot}_num_{1000 * thing + 15 * shot}.jpg") for thing in range(50) for shot in range(1, 4)]
    for fold in range(held_out.FOLDS):
        training, validation = (
            {int(path.stem.split("_")[2]) // 1000 for path in side} for side in held_out.split(images, fold)
        )
        assert not training & validation


@pytest.mark.parametrize("kind", list(synthetic_defects.KINDS))
def test_a_defect_changes_the_image_under_its_mask_and_hardly_elsewhere(kind):
    image = np.random.default_rng(0).integers(100, 140, (80, 100, 1), dtype=np.uint8).repeat(3, axis=-1)
    for number in range(4):
        damaged, mask = synthetic_defects.KINDS[kind](np.random.default_rng(number), image, number)
        again, _ = synthetic_defects.KINDS[kind](np.random.default_rng(number), image, number)
        assert (damaged == again).all()
        assert set(np.unique(mask)) == {0, 255}
        difference = np.abs(damaged.astype(int) - image)
        assert difference[mask > 0].mean() > 5 * difference[mask == 0].mean()
        assert (damaged == damaged[..., :1]).all()  # grey stays grey


def arguments(rendered_mvtec, output, **others):
    settings = {"data": {"tile": str(rendered_mvtec / "tile")}, "output": output, "weights_path": None}
    settings |= {"group": ["few"], "seeds": 1, "size": 64, "images": 40, "report_test": False, "minutes": None}
    return Namespace(**(settings | others))


@pytest.fixture
def many_images(rendered_mvtec, tmp_path):
    """The rendered tiles, more of them: a fifth of six is not enough."""
    root = tmp_path / "data"
    for number in range(25):
        (root / "tile/train/good").mkdir(parents=True, exist_ok=True)
        image = cv2.imread(str(rendered_mvtec / f"tile/train/good/{number % 6:03}.png"))
        cv2.imwrite(str(root / f"tile/train/good/{number:03}.png"), np.roll(image, number, axis=0))
    for side in ("test", "ground_truth"):
        (root / "tile" / side).symlink_to(rendered_mvtec / "tile" / side)
    return root


def test_a_run_judges_each_kind_of_defect_at_each_epoch(many_images, tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "BASE", TINY)
    variant = Variant("short", epochs=(0, 1, 2), batch_size=8, schedule="cosine", sigmas=(2.0,))
    given = arguments(many_images, tmp_path / "out", report_test=True)
    monkeypatch.setitem(GROUPS, "few", [variant])
    ((key, _),) = ablation.plan(given)
    run = carry_out(key, variant, given)
    rows = [(row["side"], row["epochs"], row["kind"]) for row in run["judged"] if row["score"] == "calibrated"]
    kinds = {"validation": ["drawn", "perlin", "spread"], "test": ["crack", "gray_stroke", "oil"]}
    assert rows == [(side, epochs, kind) for epochs in (0, 1, 2) for side in kinds for kind in kinds[side]]
    assert all(0 <= row[metric] <= 1 for row in run["judged"] for metric in ("image_auroc", "pixel_auroc", "aupro"))
    nothing = carry_out(key, replace(variant, epochs=(0,)), given)
    assert nothing["judged"] == [row for row in run["judged"] if row["epochs"] == 0]


def test_the_central_view_is_scored_by_the_same_model_or_one_of_its_own(many_images, tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "BASE", TINY)
    given = arguments(many_images, tmp_path / "out")
    whole = Variant("views", epochs=(1,), batch_size=8, sigmas=(2.0,))
    both = replace(whole, options={"center_view": True})
    monkeypatch.setitem(GROUPS, "few", [whole, both, replace(both, central_training=True)])
    fitted = []
    monkeypatch.setattr(
        ablation_run,
        "fit",
        lambda model, *others: fitted.append(model.hparams["center_crop_size"]) or fit(model, *others),
    )
    rows = [json.dumps(carry_out(key, variant, given)["judged"]) for key, variant in ablation.plan(given)]
    assert fitted == [None, None, 56, None]
    assert len(set(rows)) == 3


def test_a_rerun_makes_only_what_is_missing(rendered_mvtec, tmp_path, monkeypatch, capsys):
    made = []
    judged = [{"side": "validation", "epochs": 0, "score": "nearest", "sigma": 4.0, "kind": "drawn"}]
    judged[0] |= {"image_auroc": 0.5, "pixel_auroc": 0.75, "aupro": 0.25}

    def carry_out(key, variant, _):
        made.append((variant.name, key["seed"]))
        return {"seconds": 1.0, "judged": judged}

    monkeypatch.setattr(ablation, "carry_out", carry_out)
    monkeypatch.setitem(GROUPS, "few", [Variant("a"), Variant("b", {"gamma_d": 2})])
    for seeds in (1, 1, 2):
        monkeypatch.setattr(
            ablation, "parse_arguments", lambda seeds=seeds: arguments(rendered_mvtec, tmp_path, seeds=seeds)
        )
        assert ablation.main() == 0
    assert made == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert len((tmp_path / "ablation.jsonl").read_text().splitlines()) == 4
    assert "| b, 0 epochs, nearest | 0.500 / 0.750 / 0.250 | +0.000 ± 0.000 |" in (tmp_path / "ablation.md").read_text()


def test_a_changed_default_is_another_run(rendered_mvtec, tmp_path, monkeypatch):
    given = arguments(rendered_mvtec, tmp_path)
    monkeypatch.setitem(GROUPS, "few", [Variant("a")])
    ((before, _),) = ablation.plan(given)
    monkeypatch.setattr(variants, "BASE", {"gamma_d": 3})
    ((after, _),) = ablation.plan(given)
    assert json.dumps(before) != json.dumps(after)


def test_kept_features_are_those_of_the_backbone(tmp_path):
    model = Cfa("test_resnet.r160_in1k", pre_trained=False, image_size=64)
    images = torch.rand(3, 3, 64, 64)
    plain = model.model.pyramid(images)
    cache = FeatureCache(tmp_path, "random")
    cache.attach(model)
    first, again = model.model.pyramid(images), model.model.pyramid(images.flip(0))
    for level in range(len(plain)):
        torch.testing.assert_close(first[level], plain[level], rtol=1e-3, atol=1e-4)
        assert torch.equal(again[level], first[level].flip(0))
    assert len(list(tmp_path.iterdir())) == 3 * len(plain)


def test_the_schedule_ends_at_nothing():
    optimizer = SimpleNamespace(param_groups=[{"lr": None}])
    module = SimpleNamespace(hparams={"lr": 0.5})
    rates = []
    for step in (0, 50, 100):
        trainer = SimpleNamespace(global_step=step, estimated_stepping_batches=100, optimizers=[optimizer])
        CosineSchedule().on_train_batch_start(trainer, module, None, 0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.25, 0.0])


def test_the_table_compares_the_same_seed_and_data():
    def run(name, seed, value):
        judged = {"side": "validation", "epochs": 1, "score": "nearest", "sigma": 4.0, "kind": "drawn"}
        judged |= {"image_auroc": value, "pixel_auroc": value, "aupro": value}
        variant = {"name": name, "sigmas": [4.0]}
        return {"key": {"group": "g", "data": "tile", "seed": seed, "variant": variant}, "judged": [judged]}

    text = markdown([run("a", 0, 0.2), run("a", 1, 0.6), run("b", 0, 0.3), run("b", 1, 0.7)])
    assert "| b, 1 epochs, nearest | 0.500 / 0.500 / 0.500 | +0.100 ± 0.000 |" in text


def test_every_variant_is_a_model():
    for group in GROUPS.values():
        for variant in group:
            options = variant.model_options(128, 0) | {"pre_trained": False, "backbone": "resnet18"}
            assert Cfa(**options).hparams["seed"] == 0
