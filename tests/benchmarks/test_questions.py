import json

import accuracy
import choices
import deployment
import pytest
import speed
import thresholds
import timm
import torch
from harness.models import CFA, PADIM
from safetensors.torch import save_file

ENVIRONMENT = {"environment": {"machine": {"processor": "a CPU"}, "versions": {"torch": "2.14"}}}
TINY = "test_resnet.r160_in1k"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model(TINY).state_dict(), path)
    return path


def arguments(rendered_mvtec, weights, tmp_path, *more):
    data = [word for name in ("tile", "metal_nut") for word in ("--data", str(rendered_mvtec / name))]
    return [*data, "--size", "64", "--seeds", "1", "--output", str(tmp_path), "--threads", "1", *more]


def in_this_process(monkeypatch, module, tmp_path):
    """Tasks measured here: what a process of their own adds is tested with the runner."""
    measured = []

    def measure(question, task):
        assert question == module.__name__
        measured.append(task["label"])
        return module.measure({**task, "work": str(tmp_path)}) | ENVIRONMENT

    monkeypatch.setattr("harness.runner._in_process", measure)
    return measured


def test_accuracy_sets_models_side_by_side(rendered_mvtec, weights, tmp_path, monkeypatch):
    measured = in_this_process(monkeypatch, accuracy, tmp_path)
    line = arguments(rendered_mvtec, weights, tmp_path, "--weights-path", str(weights), "--backbone", TINY)
    line += ["--model", CFA, "--train-images", "2", "--option", "score=nearest"]
    assert accuracy.main(line) == 0
    assert accuracy.main(line) == 0
    assert len(measured) == 2  # the second time all were finished
    text = (tmp_path / "accuracy.md").read_text()
    assert "## 64 x 64, 2 training images" in text
    assert "| image AUROC | tile | metal_nut | mean |" in text
    assert "| this Cfa, score nearest (1) |" in text
    rows = (tmp_path / "accuracy.csv").read_text().splitlines()
    assert len(rows) == 3
    assert rows[0].startswith("model,data,seed,size,train_images,backbone,weights,image_RawAUROC")


def test_every_model_is_planned_for_every_set_and_size(rendered_mvtec, weights, tmp_path):
    line = arguments(rendered_mvtec, weights, tmp_path, "--weights-path", str(weights), "--size", "128")
    tasks = list(accuracy.plan(accuracy.parser().parse_args(line)))
    assert len(tasks) == 6 * 2 * 2
    assert len({str(task) for task in tasks}) == len(tasks)
    assert {task.get("side") for task in tasks if task["model"] == PADIM} == {None}
    assert {task.get("side") for task in tasks if task["model"] == "anomalib's Cfa"} == {"anomalib"}


def test_choices_compare_variants(rendered_mvtec, weights, tmp_path, monkeypatch):
    measured = in_this_process(monkeypatch, choices, tmp_path)
    monkeypatch.setattr(choices, "GROUPS", {"score": {"local": {}, "untrained": {"epochs": 0}}})
    assert choices.main(arguments(rendered_mvtec, weights, tmp_path, "--backbone", f"{TINY}={weights}")) == 0
    assert len(measured) == 4
    text = (tmp_path / "choices.md").read_text()
    assert f"## score, {TINY}" in text
    assert "development data" in text
    assert "| left out |" in text
    assert (tmp_path / "choices.png").stat().st_size > 1000


def test_the_variant_that_is_best_elsewhere_is_judged_on_the_set_left_out():
    figures = {
        "steady": {"a": 0.8, "b": 0.8, "c": 0.8},
        "lucky on a": {"a": 1.0, "b": 0.7, "c": 0.75},
    }
    assert choices.leave_one_out(figures) == {"a": ("steady", 0.8), "b": ("lucky on a", 0.7), "c": ("lucky on a", 0.75)}
    assert choices.leave_one_out({"only": {"a": 1.0}}) == {}


def test_variants_without_a_figure_for_every_set_are_left_out():
    rows = [
        {"variant": "whole", "data": "a", "x": 0.5},
        {"variant": "whole", "data": "a", "x": 0.7},
        {"variant": "whole", "data": "b", "x": 0.9},
        {"variant": "half", "data": "a", "x": 1.0},
        {"variant": "half", "data": "b", "x": None},
    ]
    assert choices.averages(rows, "x") == {"whole": {"a": pytest.approx(0.6), "b": 0.9}}


def test_thresholds_are_counted_on_both_sides(rendered_mvtec, weights, tmp_path, monkeypatch):
    in_this_process(monkeypatch, thresholds, tmp_path)
    line = arguments(rendered_mvtec, weights, tmp_path, "--weights-path", str(weights), "--backbone", TINY)
    assert thresholds.main([*line, "--train-images", "5"]) == 0
    rows = [row.split(" | ") for row in (tmp_path / "thresholds.md").read_text().splitlines() if " 5 | " in row]
    assert len(rows) == 2 * 2 * 2
    for _, _, rate, *shares in rows:
        assert rate in {"1 %", "5 %"}
        assert all(0 <= float(share.rstrip(" %|")) <= 100 for share in shares)
    [source] = {result["images"] for task, result in stored(tmp_path) if task["source"] == "held out"}
    assert source == 4


def stored(folder):
    lines = (folder / "thresholds.jsonl").read_text().splitlines()
    return [(record["task"], record["result"]) for record in map(json.loads, lines)]


def test_speed_measures_each_part(weights, tmp_path, monkeypatch):
    shared = {"backbone": TINY, "size": 64, "device": "cpu", "images": 8, "files": {TINY: str(weights)}, "bank": 50}
    for what, figures in {"build": {"backbone_s", "bank_s"}, "step": {"small_s", "large_s"}}.items():
        found = speed.measure({"what": what, **shared})
        assert all(found[name] > 0 for name in figures)
    monkeypatch.setattr(speed, "_BATCH", 2)
    found = speed.measure({"what": "image", **shared})
    assert found["one_s"] > 0
    assert speed.measure({"what": "fit", "model": CFA, **shared})["seconds"] > 0


def test_speed_reports_ratios_and_growth(tmp_path, weights):
    options = speed.parser().parse_args(["--backbone", f"resnet18={weights}", "--output", str(tmp_path)])
    runs = []
    for task in speed.plan(options):
        seconds = 1.0 if task.get("model") == CFA else 5.0
        figures = {"backbone_s": 4.0, "bank_s": 2.0, "centers": 16384, "small_s": 1.0, "large_s": 1.2}
        bank = task.get("bank") or 0
        figures |= {"one_backbone_s": 1.0, "one_s": 1 + bank**0.5, "batch_backbone_s": 1.0, "batch_s": 2.0}
        runs.append((task, {**figures, "seconds": seconds, "inertia": 1.0, **ENVIRONMENT}))
    speed.report(runs, options)
    text = (tmp_path / "speed.md").read_text()
    assert "over the backbone's pass over 300 images | 2.00 s | 0.167 |" in text
    assert "| resnet18, 256 x 256 | 0.50 |" in text
    assert "K-means" not in text
    assert "| k-means, seconds: anomalib's Cfa over this package | 1.00 | 5.00 | 5.00 |" in text


def test_deployment_reports_agreement(tmp_path, rendered_mvtec):
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.touch()
    line = ["--ckpt_path", str(checkpoint), "--data", str(rendered_mvtec / "tile"), "--output", str(tmp_path)]
    options = deployment.parser().parse_args(line)
    figures = {"whole_s": 0.03, "backbone_s": 0.02, "score_difference": 1e-6, "flipped": 0, "images": 8, "bytes": 2**20}
    figures |= {"pixels_beyond_1e-4": 0, "image_auroc": 1.0, "pixel_auroc": 0.9, "centers": 9, **ENVIRONMENT}
    deployment.report([(task, figures) for task in deployment.plan(options)], options)
    text = (tmp_path / "deployment.md").read_text()
    row = "| OpenVINO, float32 | 1e-06 | 0 of 8 | 0.000 % | 1.0000 | 0.9000 | 1.0 MiB | 30.0 ms | 0.50 |"
    assert row in text
    assert "| this Cfa, f32 | 9 | 30.0 ms |" in text
