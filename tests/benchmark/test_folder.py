"""What jobs leave behind is whole or absent."""

import json
from pathlib import Path

import pytest
from benchmark_jobs import result_of, spec_of

from anomalib_cfa.benchmark.folder import Case, Failure, RunFolder


def test_a_half_written_result_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    folder = RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        folder.save_result(result_of())
    assert not folder.has_result(spec_of().key)
    assert not list(folder.results())


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
