"""The benchmark: runs go on where they stopped, a failure costs one job, and the report says what was measured."""

import json
import math
import multiprocessing
import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from anomalib.data import ImageBatch
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator
from torchvision.tv_tensors import Image

from anomalib_cfa import Cfa
from anomalib_cfa.benchmark import published
from anomalib_cfa.benchmark.__main__ import main
from anomalib_cfa.benchmark.building import build_datamodule, build_model
from anomalib_cfa.benchmark.cases import CaseKeeper
from anomalib_cfa.benchmark.folder import Case, Failure, Result, RunFolder
from anomalib_cfa.benchmark.generator import JobGenerator
from anomalib_cfa.benchmark.job import Job
from anomalib_cfa.benchmark.labels import label_settings
from anomalib_cfa.benchmark.report import write_report
from anomalib_cfa.benchmark.runners import ParallelRunner
from anomalib_cfa.benchmark.spec import JobSpec, expand
from anomalib_cfa.benchmark.summary import AVERAGE, summarize, tabulate

TINY = {"backbone": "test_resnet.r160_in1k", "pre_trained": False, "image_size": 64}


def section(root, arguments=None, **changes):
    """The ``benchmark`` section of a file, for the rendered category ``tile``."""
    data = {"root": str(root), "category": "tile", "train_batch_size": 4, "num_workers": 0}
    return {
        "seed": 0,
        "model": {"class_path": "Cfa", "init_args": TINY | (arguments or {})},
        "data": {"class_path": "MVTecAD", "init_args": data},
        "trainer": {"max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False},
    } | changes


def write_config(path, benchmark, accelerator="cpu"):
    path.write_text(yaml.safe_dump({"accelerator": accelerator, "benchmark": benchmark}))
    return str(path)


def spec_of(category="screw", seed=0, data="MVTecAD", **model):
    arguments = {"backbone": "resnet18", "seed": seed} | model
    named = {"class_path": data, "init_args": {"category": category}}
    return JobSpec("cpu", {"seed": 0, "model": {"class_path": "Cfa", "init_args": arguments}, "data": named})


def result_of(spec=None, image_auroc=0.9, test_images=160, **changes):
    spec = spec or spec_of()
    metrics = {"image_AUROC": image_auroc, "pixel_AUROC": 0.95, "pixel_AUPRO": 0.9, "image_F1Score": None}
    result = Result(
        accelerator=spec.accelerator,
        config=spec.config,
        metrics=metrics,
        seconds={"fit": 10.0, "test": 1.6},
        peak_memory={"host": 2**30, "device": None},
        images={"train": 8, "test": test_images},
        epochs=30,
        threshold_from="test",
        weights="resnet18.tv_in1k",
        versions={"torch": "2.10"},
        machine={"cores": "2"},
        finished="2026-01-01T00:00:00+00:00",
        cases=[],
    )
    return replace(result, **changes)


@pytest.fixture(scope="module")
def first_run(rendered_mvtec, tmp_path_factory):
    """A run of two seeds and of a backbone that does not exist: its exit status, folder and config."""
    folder = tmp_path_factory.mktemp("benchmark")
    model = {"backbone": {"grid": [TINY["backbone"], "no_such_backbone"]}, "seed": {"grid": [0, 1]}}
    config = write_config(folder / "small.yaml", section(rendered_mvtec, model))
    return SimpleNamespace(
        status=main(["--config", config, "--output", str(folder / "run")]),
        folder=RunFolder(folder / "run"),
        config=config,
    )


@pytest.fixture
def measured(monkeypatch):
    """The keys of jobs that would have been measured; nothing is trained."""
    keys = []

    def measure(job, task_id):
        keys.append(job.spec.key)
        return result_of(job.spec)

    monkeypatch.setattr(Job, "_measure", measure)
    return keys


# Runs


def test_a_failing_job_is_told_and_costs_none_of_the_others(first_run):
    assert first_run.status == 1
    assert sorted(result.spec.seed for result in first_run.folder.results()) == [0, 1]
    failures = list(first_run.folder.failures())
    assert [failure.spec.seed for failure in failures] == [0, 1]
    assert all("backbone must be" in failure.reason and "Traceback" in failure.traceback for failure in failures)


def test_a_result_holds_what_the_report_needs(first_run):
    result = next(first_run.folder.results())
    assert set(result.metrics) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score", "pixel_AUPRO"}
    assert all(0 <= value <= 1 for value in result.metrics.values())
    assert result.epochs == 2
    assert result.images == {"train": 6, "test": 8}
    assert result.threshold_from == "test"
    assert result.weights == "test_resnet.r160_in1k, untrained"
    assert min(result.seconds.values()) > 0
    assert result.peak_memory["host"] is None or result.peak_memory["host"] > 2**26
    assert {"anomalib-cfa", "anomalib", "torch"} <= set(result.versions)
    assert [case.kind for case in result.cases] == ["best", "best", "worst", "worst"]
    assert all((first_run.folder.root / case.picture).is_file() for case in result.cases)


def test_seeds_differ_and_the_same_seed_repeats(first_run, tmp_path):
    zero, one = first_run.folder.results()
    assert zero.metrics["pixel_AUROC"] != one.metrics["pixel_AUROC"]
    again = Job(zero.spec, RunFolder(tmp_path), "again")._measure(None)
    assert again.metrics == zero.metrics


def test_nothing_is_left_of_work_under_way(first_run):
    assert not first_run.folder.work.exists()
    assert not list(first_run.folder.root.rglob("*.draft"))


def test_a_rerun_does_what_is_missing_and_what_failed(first_run, measured, tmp_path):
    folder = RunFolder(tmp_path / "run")
    done = next(first_run.folder.results())
    folder.save_result(done)
    assert main(["--config", first_run.config, "--output", str(folder.root)]) == 0
    assert len(measured) == 3
    assert done.spec.key not in measured
    assert main(["--config", first_run.config, "--output", str(folder.root)]) == 0
    assert len(measured) == 3


def test_a_larger_grid_goes_on_with_the_smaller_ones_results(measured, tmp_path):
    for seeds, new in (([0], 1), ([0, 1, 2], 2)):
        config = write_config(tmp_path / "grid.yaml", section("data", {"seed": {"grid": seeds}}))
        before = len(measured)
        main(["--config", config, "--output", str(tmp_path / "run")])
        assert len(measured) - before == new


def test_an_interruption_keeps_what_is_finished_and_is_no_failure(first_run, monkeypatch, tmp_path, capsys):
    def measure(job, task_id):
        if job.spec.seed == 1:
            raise KeyboardInterrupt
        return result_of(job.spec)

    monkeypatch.setattr(Job, "_measure", measure)
    assert main(["--config", first_run.config, "--output", str(tmp_path)]) == 130
    folder = RunFolder(tmp_path)
    assert [result.spec.seed for result in folder.results()] == [0]
    assert not list(folder.failures())
    assert "goes on with the rest" in capsys.readouterr().err


def test_a_half_written_result_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    folder = RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        folder.save_result(result_of())
    assert not folder.has_result(spec_of().key)
    assert not list(folder.results())


def test_progress_names_category_seed_and_what_is_left(measured, tmp_path, capsys):
    config = write_config(tmp_path / "grid.yaml", section("data", {"seed": {"grid": [3, 4]}}))
    main(["--config", config, "--output", str(tmp_path / "run")])
    output = capsys.readouterr().out
    assert "[1 of 2, 1 left after it] tile, seed 3" in output
    assert "[2 of 2, 0 left after it] tile, seed 4" in output
    assert "2 of 2 jobs are done, 0 failed" in output


def test_validation_is_after_the_last_epoch_only(rendered_mvtec, tmp_path, monkeypatch):
    epochs = []
    monkeypatch.setattr(Cfa, "on_validation_epoch_start", lambda model: epochs.append(model.current_epoch))
    (spec,) = expand("cpu", section(rendered_mvtec))
    result = Job(spec, RunFolder(tmp_path), "validated")._measure(None)
    assert epochs == [1]
    assert result.metrics["image_F1Score"] is not None


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"benchmark": {}}, "accelerator"),
        ({"accelerator": "cpu", "benchmark": {"seed": 0, "model": "Cfa"}}, "lacks data"),
        ({"accelerator": "tpu", "benchmark": section("data")}, "tpu"),
    ],
)
def test_a_wrong_file_is_refused_before_any_work(config, named, tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["--config", str(path), "--output", str(tmp_path / "run")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_once_and_not_by_every_job(tmp_path, capsys):
    config = write_config(tmp_path / "gpu.yaml", section("data"), accelerator="cuda")
    assert main(["--config", config, "--output", str(tmp_path / "run")]) == 2
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only forked processes know what a test has patched")
def test_a_process_that_dies_costs_its_own_job_only(tmp_path, monkeypatch):
    def measure(job, task_id):
        if job.spec.seed == 1:
            os._exit(1)  # as the system would, for want of memory
        return result_of(job.spec)

    monkeypatch.setattr(Job, "_measure", measure)
    forks = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: forks)
    folder = RunFolder(tmp_path)
    ParallelRunner(JobGenerator("cpu", folder), n_jobs=2).run(section("data", {"seed": {"grid": [0, 1, 2, 3]}}))
    assert [failure.spec.seed for failure in folder.failures()] == [1]
    assert "died twice" in next(folder.failures()).reason
    assert sorted(result.spec.seed for result in folder.results()) == [0, 2, 3]


def test_a_job_can_be_sent_to_another_process(tmp_path):
    job = next(JobGenerator("cpu", RunFolder(tmp_path)).generate_jobs(section("data")))
    assert pickle.loads(pickle.dumps(job)).spec == job.spec


# Jobs


def test_anomalibs_own_generator_builds_the_same_file(rendered_mvtec):
    jobs = list(BenchmarkJobGenerator("cpu")(section(rendered_mvtec, {"seed": {"grid": [0, 1]}}), None))
    assert [job.model.hparams["seed"] for job in jobs] == [0, 1]


@pytest.mark.parametrize(("own", "seed"), [({}, 7), ({"seed": 3}, 3)])
def test_the_runs_seed_reaches_the_model_unless_the_file_gives_it_one(own, seed):
    (spec,) = expand("cpu", section("data", own, seed=7))
    assert build_model(spec).hparams["seed"] == seed
    assert spec.seed == seed


def test_every_model_is_tested_with_the_same_metrics_and_draws_nothing():
    (spec,) = expand("cpu", section("data", model={"class_path": "Padim", "init_args": {"pre_trained": False}}))
    model = build_model(spec)
    assert {metric.name for metric in model.evaluator.test_metrics} >= {"pixel_AUPRO", "image_AUROC"}
    assert model.visualizer is None


def test_a_data_module_of_another_package_is_found_by_its_path():
    data = {"class_path": "anomalib_cfa.data.RotatedMVTecAD", "init_args": {"category": "screw"}}
    (spec,) = expand("cpu", section("data", data=data))
    assert type(build_datamodule(spec)).__name__ == "RotatedMVTecAD"


def test_a_class_path_of_something_else_is_refused():
    (spec,) = expand("cpu", section("data", data={"class_path": "pathlib.Path"}))
    with pytest.raises(TypeError, match="class_path"):
        build_datamodule(spec)


def test_a_jobs_key_depends_on_all_that_the_file_says():
    keys = {spec_of().key, spec_of(seed=1).key, spec_of(category="tile").key, spec_of(gamma_d=2).key}
    assert len(keys) == 4
    assert spec_of().key == spec_of().key


def test_the_grid_shares_nothing_between_its_points():
    grid = {"grid": [{"class_path": "Cfa", "init_args": TINY}]}
    one, other = expand("cpu", section("data", model=grid, seed={"grid": [0, 1]}))
    assert one.config["model"] is not other.config["model"]
    assert TINY == {"backbone": "test_resnet.r160_in1k", "pre_trained": False, "image_size": 64}


def test_the_keeper_keeps_the_best_and_worst_of_each_kind(tmp_path):
    model = Cfa(**TINY)
    model.post_processor._image_threshold.fill_(1.0)
    keeper = CaseKeeper()
    for scores, labels in (([3.0, 0.9, 0.5], [1, 1, 0]), ([1.2, 1.4, 0.8], [0, 1, 0])):
        batch = ImageBatch(
            image=Image(torch.rand(3, 3, 32, 48)),
            gt_label=torch.tensor(labels),
            pred_score=torch.tensor(scores),
            anomaly_map=torch.rand(3, 32, 48),
            image_path=[f"tile/test/any/{score}.png" for score in scores],
        )
        keeper.on_test_batch_end(None, model, batch, None, 0)
    cases = keeper.draw(tmp_path / "cases", tmp_path)
    assert [(case.kind, case.is_defective, case.image) for case in cases] == [
        ("best", True, "any/3.0.png"),
        ("best", False, "any/0.5.png"),
        ("worst", True, "any/0.9.png"),
        ("worst", False, "any/1.2.png"),
    ]
    assert [case.margin for case in cases] == pytest.approx([2, 0.5, -0.1, -0.2])
    assert all((tmp_path / case.picture).is_file() for case in cases)


# Reports


def test_a_report_of_a_real_run_shows_pictures_that_exist(first_run, tmp_path):
    report = write_report(first_run.folder.root)
    page = report.with_name("heat_maps.md")
    for text in (report.read_text(), page.read_text()):
        pictures = [part.partition(")")[0] for part in text.split("](")[1:]]
        assert pictures
        assert all((report.parent / picture).is_file() for picture in pictures)
    text = report.read_text()
    assert "2 of the 4 jobs of the config are missing" in text
    assert "no_such_backbone" in text
    assert "threshold chosen on the test side" in text
    assert "Seeds: 0, 1" in text
    assert len(pd.read_csv(report.with_name("results.csv"))) == 2
    assert list(pd.read_csv(report.with_name("summary.csv"))["category"]) == ["tile", AVERAGE]


def test_published_figures_stand_only_beside_the_data_set_that_they_are_of(first_run, tmp_path):
    real = RunFolder(tmp_path / "real")
    real.save_result(result_of())
    text = write_report(real.root).read_text()
    assert "best epoch on the test set" in text
    assert "early" in text or "stopped after 5 epochs" in text
    assert "| screw | 1 | 90.0 | 95.0 | 90.0 | 10.0 | 1.6 | 93.5 | 98.8 | 62.5 | 97.3 | 88.4 |" in text
    for other in (result_of(test_images=8), result_of(spec_of(data="anomalib_cfa.data.RotatedMVTecAD"))):
        folder = RunFolder(tmp_path / other.spec.data_name)
        folder.save_result(other)
        assert "93.5" not in write_report(folder.root).read_text()


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "at least one result" in capsys.readouterr().err


def test_the_summary_averages_over_seeds_and_then_over_categories():
    values = {("screw", 0): 0.8, ("screw", 1): 0.9, ("tile", 0): 1.0, ("tile", 1): 0.9}
    results = [result_of(spec_of(*point), value, test_images=5) for point, value in values.items()]
    summary = summarize(tabulate(results)).set_index("category")
    assert summary.loc["screw", "image AUROC"] == pytest.approx(85)
    assert summary.loc["screw", "image AUROC ±"] == pytest.approx(100 * 0.1 / math.sqrt(2))
    assert summary.loc[AVERAGE, "image AUROC"] == pytest.approx(90)
    assert summary.loc[AVERAGE, "image AUROC ±"] == pytest.approx(0)
    assert summary.loc[AVERAGE, "seeds"] == 2


def test_the_average_leaves_out_seeds_that_lack_a_category():
    points = {("screw", 0): 0.8, ("screw", 1): 0.2, ("tile", 0): 1.0}
    results = [result_of(spec_of(*point), value) for point, value in points.items()]
    average = summarize(tabulate(results)).set_index("category").loc[AVERAGE]
    assert average["image AUROC"] == pytest.approx(90)
    assert average["seeds"] == 1


def test_settings_are_told_apart_by_what_differs():
    specs = [spec_of(), spec_of(seed=1), spec_of("tile"), spec_of(center_crop_size=224), spec_of(gamma_d=2)]
    specs += [spec_of(data="anomalib_cfa.data.RotatedMVTecAD"), spec_of(weights_path="/some/where/file.pth")]
    labels = label_settings(specs)
    assert labels[0] == labels[1] == labels[2]
    assert labels[2:] == [
        "Cfa, resnet18, R",
        "Cfa, resnet18, R+C 224",
        "Cfa, resnet18, R, gamma_d 2",
        "Cfa, resnet18, R, RotatedMVTecAD",
        "Cfa, resnet18, R, weights_path file.pth",
    ]


def test_the_published_figures_average_to_what_their_sources_say():
    def average(table, index):
        return sum(figures[index] for figures in table.values()) / len(table)

    stated = {"R+C": (99.3, 98.2), "R": (99.0, 98.5)}
    for view, averages in stated.items():
        assert [average(published._PAPER[view], i) for i in (0, 1)] == pytest.approx(averages, abs=0.06)
    stated = {"resnet18": (93.0, 97.9, 91.7), "wide_resnet50_2": (95.6, 98.3, 92.4)}
    for backbone, averages in stated.items():
        assert [average(published._ANOMALIB[backbone], i) for i in (0, 1, 2)] == pytest.approx(averages, abs=0.06)
    assert sum(published._TEST_IMAGES.values()) == 1725


def test_results_and_failures_survive_being_saved(tmp_path):
    folder = RunFolder(tmp_path)
    case = Case("best", "oil/0.png", True, 3.0, 1.0, 2.0, "cases/x/best_1.jpg")
    saved, failure = result_of(cases=[case]), Failure("cpu", spec_of().config, "a title", "a reason", "lines")
    folder.save_failure(failure)
    assert list(folder.failures()) == [failure]
    folder.save_result(saved)
    assert list(folder.results()) == [saved]
    assert not list(folder.failures())
    json.loads(next((tmp_path / "results").iterdir()).read_text())


def test_cfa_plus_plus_stands_beside_the_papers_better_view_of_each_figure():
    class_path = {"class_path": "Cfa", "init_args": {"center_view": True}}
    averages = []
    for category in published._PAPER["R"]:
        config = {"model": class_path, "data": {"class_path": "MVTecAD", "init_args": {"category": category}}}
        figures = published.paper(JobSpec("cpu", config))
        averages.append((figures.image_auroc, figures.pixel_auroc))
    means = [sum(column) / len(column) for column in zip(*averages, strict=True)]
    assert means == pytest.approx([99.5, 98.5], abs=0.06)  # the authors' README
