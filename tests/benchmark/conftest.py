"""Runs of the benchmark that several of its test modules share."""

from types import SimpleNamespace

import pytest
from benchmark_jobs import TINY, result_of, section, write_config

from anomalib_cfa.benchmark.__main__ import main
from anomalib_cfa.benchmark.folder import RunFolder
from anomalib_cfa.benchmark.job import Job


@pytest.fixture(scope="session")
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
