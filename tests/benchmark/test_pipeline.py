"""Runs go on where they stopped, and a failure costs one job."""

import multiprocessing
import os
import pickle

import pytest
import torch
import yaml
from benchmark_jobs import result_of, section, write_config

from anomalib_cfa.benchmark.__main__ import main
from anomalib_cfa.benchmark.folder import RunFolder
from anomalib_cfa.benchmark.job import Job
from anomalib_cfa.benchmark.pipeline import JobGenerator, ParallelRunner


def test_a_failing_job_is_told_and_costs_none_of_the_others(first_run):
    assert first_run.status == 1
    assert sorted(result.spec.seed for result in first_run.folder.results()) == [0, 1]
    failures = list(first_run.folder.failures())
    assert [failure.spec.seed for failure in failures] == [0, 1]
    assert all("backbone must be" in failure.reason and "Traceback" in failure.traceback for failure in failures)


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
    assert "run the same command again" in capsys.readouterr().err


def test_progress_names_category_seed_and_what_is_left(measured, tmp_path, capsys):
    config = write_config(tmp_path / "grid.yaml", section("data", {"seed": {"grid": [3, 4]}}))
    main(["--config", config, "--output", str(tmp_path / "run")])
    output = capsys.readouterr().out
    assert "[1 of 2, 1 left after it] tile, seed 3" in output
    assert "[2 of 2, 0 left after it] tile, seed 4" in output
    assert "2 of 2 jobs are done, 0 failed" in output


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
