"""A job builds what the file says, and measures every model in the same way."""

from types import SimpleNamespace

import pytest
import torch
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator
from benchmark_jobs import section

from anomalib_cfa import Cfa
from anomalib_cfa.benchmark.folder import RunFolder
from anomalib_cfa.benchmark.job import Job, _threshold_side, build_datamodule, build_model
from anomalib_cfa.benchmark.spec import expand


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


def test_validation_is_after_the_last_epoch_only(rendered_mvtec, tmp_path, monkeypatch):
    epochs = []
    monkeypatch.setattr(Cfa, "on_validation_epoch_start", lambda model: epochs.append(model.current_epoch))
    (spec,) = expand("cpu", section(rendered_mvtec))
    result = Job(spec, RunFolder(tmp_path), "validated")._measure(None)
    assert epochs == [1]
    assert result.metrics["image_F1Score"] is not None


def test_a_page_that_cannot_be_written_costs_no_result(rendered_mvtec, tmp_path, monkeypatch, capsys):
    devices = []

    def run_out_of_memory(model, device=None):
        devices.append(device)
        raise torch.OutOfMemoryError

    monkeypatch.setattr("anomalib_cfa.benchmark.job.ModelPredictor", run_out_of_memory)
    (spec,) = expand("cpu", section(rendered_mvtec))
    job = Job(spec, RunFolder(tmp_path), "crowded")
    job.run()
    assert job.folder.has_result(spec.key)
    assert devices == ["cpu"]  # the job's, even if there is a GPU
    assert "crowded: no inspection page: OutOfMemoryError" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("mode", "has_images", "side"),
    [
        ("from_dir", True, "validation"),
        ("none", True, "validation"),
        ("none", False, "none"),
        ("from_test", True, "test"),
    ],
)
def test_a_result_says_which_images_chose_the_thresholds(rendered_mvtec, mode, has_images, side):
    spec = next(expand("cpu", section(rendered_mvtec)))
    datamodule = SimpleNamespace(val_split_mode=mode, **({"val_data": []} if has_images else {}))
    assert _threshold_side(build_model(spec), datamodule) == side
