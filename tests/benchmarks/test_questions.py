import csv
import importlib
import json
import re
import shutil
from pathlib import Path

import accuracy
import choices
import deployment
import dirty
import pytest
import speed
import thresholds
import timm
import torch
from harness import answer
from harness.models import CFA, PADIM, PATCHCORE_1
from safetensors.torch import save_file
from soak import SOAK
from tiny import engine, mvtec, tiny_cfa

from anomalib_cfa.training.out_of_bag import OutOfBagScores

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    {
        command.strip()
        for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
        for command in re.findall(r"^python benchmarks/[^#\n]+", page.read_text(), re.MULTILINE)
    }
)
ENVIRONMENT = {"environment": {"machine": {"processor": "a CPU"}, "versions": {"torch": "2.14"}}}
TINY = "test_resnet.r160_in1k"
IN_SOAK = pytest.mark.skipif(not SOAK, reason="two exports: make soak")


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
    assert answer("accuracy", line) == 0
    assert answer("accuracy", line) == 0
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
    assert answer("choices", arguments(rendered_mvtec, weights, tmp_path, "--backbone", f"{TINY}={weights}")) == 0
    assert len(measured) == 4
    text = (tmp_path / "choices.md").read_text()
    assert f"## score, {TINY}" in text
    assert "development data" in text
    assert "| left out |" in text
    assert (tmp_path / "choices.png").stat().st_size > 1000


def test_a_curve_ends_where_a_fit_of_as_many_epochs_does(rendered_mvtec, weights, tmp_path, monkeypatch):
    in_this_process(monkeypatch, choices, tmp_path)
    variants = {"lr": {"epochs": [0, 1, 2]}, "none": {"epochs": 0}, "one": {"epochs": 1}, "two": {"epochs": 2}}
    for name, arguments_of_cfa in variants.items():
        variants[name] = {**arguments_of_cfa, "lr": 0.1}
    monkeypatch.setattr(choices, "GROUPS", {"training": variants})
    line = arguments(rendered_mvtec, weights, tmp_path, "--backbone", f"{TINY}={weights}")
    assert answer("choices", line) == 0
    rows = csv.DictReader((tmp_path / "choices.csv").open())
    found = {(row["variant"], row["data"]): row["pixel_AUPRO"] for row in rows}
    assert len(found) == 6 * 2
    for data in ("tile", "metal_nut"):
        curve = [found[f"lr, {epochs} epochs", data] for epochs in range(3)]
        assert list(map(float, curve)) == pytest.approx([float(found[name, data]) for name in ("none", "one", "two")])
        assert len(set(curve)) == 3


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
    assert answer("thresholds", [*line, "--train-images", "5"]) == 0
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
    found = speed.measure({"what": "fit", "model": CFA, **shared})
    assert all(found[name] > 0 for name in ("fit_s", "fit_peak_bytes", "step_s", "one_s", "batch_s"))


def test_speed_measures_what_is_asked_for(weights):
    options = speed.parser().parse_args(["--backbone", f"resnet18={weights}", "--what", "build", "--what", "k_means"])
    assert {task["what"] for task in speed.plan(options)} == {"build", "k_means"}


def test_speed_reports_ratios_and_growth(tmp_path, weights):
    options = speed.parser().parse_args(["--backbone", f"resnet18={weights}", "--output", str(tmp_path)])
    runs = []
    for task in speed.plan(options):
        seconds = 1.0 if task.get("model") == CFA else 5.0
        figures = {"backbone_s": 4.0, "bank_s": 2.0, "centers": 16384, "small_s": 1.0, "large_s": 1.2}
        bank = task.get("bank") or 0
        figures |= {"one_backbone_s": 1.0, "one_s": 1 + bank**0.5, "batch_backbone_s": 1.0, "batch_s": 2.0}
        runs.append((task, {**figures, "seconds": seconds, "inertia": 1.0, "fit_s": seconds, **ENVIRONMENT}))
    speed.report(runs, options)
    text = (tmp_path / "speed.md").read_text()
    assert "16384 centres from 300 images / the backbone's pass over them | 2.00 s | 0.5 |" in text
    assert "| resnet18, 256 x 256 | 0.50 |" in text
    for what in ("K-means", "fit"):
        assert f"| {what}, seconds: anomalib's Cfa over this package | 1.00 | 5.00 | 5.00 |" in text


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


def test_dirty_sets_train_on_what_they_do_not_test(rendered_mvtec):
    root = rendered_mvtec / "tile"
    tested = {}
    for mixed in (0, 1, 3):
        images = dirty.DirtySet(root, mixed, reserved=3, seed=0)
        images.setup()
        assert len(images.mixed) == mixed
        assert {name for name in images.mixed if "/test/good/" not in name} == set(images.mixed)
        trained = set(images.train_data.samples.image_path)
        assert trained == {*map(str, (root / "train/good").iterdir()), *images.mixed}
        assert not images.train_data.has_anomalous
        tested[mixed] = set(images.test_data.samples.image_path)
        assert not tested[mixed] & trained
        assert images.test_data.has_anomalous
        assert images.train_data[len(trained) - 1].image.ndim == 3
    assert tested[0] == tested[1] == tested[3]
    assert len(tested[0]) == dirty.count_images(root)[1] + 2 - 3
    without = dirty.DirtySet(root, 3, 3, 0, without=images.mixed[:1])
    without.setup()
    assert set(without.train_data.samples.image_path) == trained - set(images.mixed[:1])


@pytest.mark.parametrize(
    ("normal", "defective", "mixed"),
    [(300, 150, [0, 3, 6, 16, 33]), (54, 71, [0, 1, 1, 3, 6]), (300, 22, [0, 3, 6, 11, 11])],
)
def test_a_share_is_of_the_training_images_and_half_of_the_defective_ones_at_most(normal, defective, mixed):
    assert [dirty.mixed_images(share, normal, defective) for share in (0, 1, 2, 5, 10)] == mixed


def test_dirty_measures_variants_and_fits_again_without_what_was_named(rendered_mvtec, weights, tmp_path, monkeypatch):
    measured = in_this_process(monkeypatch, dirty, tmp_path)
    named = str(next((rendered_mvtec / "tile/train/good").iterdir()))
    monkeypatch.setattr(OutOfBagScores, "worst", lambda *_: [(named, 9.0)])
    line = arguments(rendered_mvtec, weights, tmp_path, "--weights-path", str(weights), "--backbone", TINY)
    options = dirty.parser().parse_args(line)
    planned = [task for task in dirty.plan(options) if task["data"] == "tile" and task["mixed"] == 1]
    monkeypatch.setattr(dirty, "plan", lambda _: planned)
    assert answer("dirty", line) == 0
    assert answer("dirty", line) == 0
    assert len(measured) == 2  # the second time all were finished
    results = [json.loads(line)["result"] for line in (tmp_path / "dirty.jsonl").read_text().splitlines()]
    assert results[0]["training_images"] == results[1]["training_images"] == 7
    assert (results[0]["named"], results[0]["right"]) == (1, 0)
    assert results[0]["again"]["pixel_AUPRO"] != results[0]["pixel_AUPRO"]
    assert "again" not in results[1]


def test_dirty_reports_each_share_and_what_changes(rendered_mvtec, weights, tmp_path):
    line = arguments(rendered_mvtec, weights, tmp_path, "--weights-path", str(weights))
    options = dirty.parser().parse_args(line)
    runs = []
    for task in dirty.plan(options):
        metrics = {"image_RawAUROC": 0.9 - 0.1 * task["mixed"], "pixel_AUPRO": 0.8}
        extra = {"named": 2, "right": task["mixed"], "again": metrics} if task["variant"] == dirty.AS_TYPED else {}
        runs.append((task, {**metrics, **extra, **ENVIRONMENT}))
    dirty.report(runs, options)
    text = (tmp_path / "dirty.md").read_text()
    assert "|  | 0 %: 0 mixed in | 1 % and 2 % and 5 % and 10 %: 1 mixed in |" in text
    assert "| this Cfa, fitted again without the images it names: AUPRO | 0.800 | 0.800 |" in text
    assert "| mixed in, of those it names | 0 of 2 | 1 of 2 |" in text
    change = "-0.100 (2 sets)"
    assert f"| this Cfa, as typed: image AUROC | +0.000 (2 sets) | {change} | {change} | {change} | {change} |" in text
    assert "development data" in text


def test_patchcore_is_compared_on_small_sets_only(rendered_mvtec, weights, tmp_path, monkeypatch):
    line = arguments(rendered_mvtec, weights, tmp_path, "--weights-path", str(weights), "--peers")
    for normal, models in ((100, {CFA, PADIM, PATCHCORE_1}), (101, {CFA, PADIM})):
        monkeypatch.setattr(dirty, "count_images", lambda _, normal=normal: (normal, 50))
        tasks = list(dirty.plan(dirty.parser().parse_args(line)))
        assert {task["model"] for task in tasks} == models
        assert len({str(task) for task in tasks}) == len(tasks)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_docs_is_understood(command, rendered_mvtec, weights):
    _, script, *words = command.translate(str.maketrans("", "", "[]")).split()
    sets = iter(("tile", "metal_nut"))
    given = [
        str(rendered_mvtec / next(sets)) if word == "SET" else re.sub(r"\b(FILE|MODEL\.ckpt)$", str(weights), word)
        for word in words
    ]
    importlib.import_module(Path(script).stem).parser().parse_args(given)


def test_the_docs_have_a_command_for_every_question():
    named = {re.search(r"benchmarks/\w+\.py", command)[0] for command in COMMANDS}
    assert named == {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("*.py")}


def test_sets_of_one_name_are_refused(rendered_mvtec, weights, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(rendered_mvtec / "tile", tmp_path / "tile")
    line = ["--weights-path", str(weights), "--data", str(rendered_mvtec / "tile")]
    with pytest.raises(SystemExit):
        accuracy.parser().parse_args([*line, "--data", str(copy)])
    assert "--data must be folders of different names, but two are called 'tile'" in capsys.readouterr().err
    monkeypatch.chdir(copy)
    assert accuracy.parser().parse_args([*line[:2], "--data", "."]).data == [copy]


@pytest.mark.parametrize("change", ["other weights", "--threads 2"])
def test_what_was_measured_under_other_conditions_is_measured_anew(
    rendered_mvtec, weights, tmp_path, monkeypatch, change
):
    tried = []
    monkeypatch.setattr("harness.runner._in_process", lambda _, task: tried.append(task) or {"x": 1} | ENVIRONMENT)
    monkeypatch.setattr(choices, "report", lambda *_: None)
    line = arguments(rendered_mvtec, weights, tmp_path, "--group", "views")
    other = tmp_path / "other" / weights.name
    other.parent.mkdir()
    other.write_bytes(weights.read_bytes() + b" ")
    for file, threads in (
        (weights, "1"),
        (weights, "1"),
        (other, "1") if change == "other weights" else (weights, "2"),
    ):
        assert answer("choices", [*line, "--backbone", f"{TINY}={file}", "--threads", threads]) == 0
    assert len(tried) == 2 * 2 * 2


@pytest.mark.parametrize("way", ["PyTorch", pytest.param("OpenVINO, float32", marks=IN_SOAK)])
@pytest.mark.parametrize("has_masks", [True, False])
def test_a_way_to_deploy_is_measured(rendered_mvtec, tmp_path, way, has_masks):
    root = shutil.copytree(rendered_mvtec / "tile", tmp_path / "tile")
    if not has_masks:
        shutil.rmtree(root / "ground_truth")
    model, run = tiny_cfa(), engine(tmp_path)
    run.fit(model, datamodule=mvtec(rendered_mvtec))
    task = {"way": way, "root": str(root), "test_step": 1, "threads": 1, "work": str(tmp_path)}
    found = deployment.measure({**task, "ckpt_path": run.best_model_path})
    assert (found["flipped"], found["images"]) == (0, 8)
    assert found["score_difference"] < 1e-4
    assert ("pixel_auroc" in found) == has_masks
    assert found["whole_s"] > found["backbone_s"] > 0
