"""The report says what was measured, and shows published figures only beside the same data set."""

import pandas as pd
from benchmark_jobs import result_of, spec_of

from anomalib_cfa.benchmark.__main__ import main
from anomalib_cfa.benchmark.folder import RunFolder
from anomalib_cfa.benchmark.report import write_report
from anomalib_cfa.benchmark.tables import AVERAGE


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
    assert "threshold chosen on the test split" in text
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


def test_the_command_says_where_the_report_and_the_inspection_pages_lie(first_run, capsys):
    root = first_run.folder.root
    assert main(["report", str(root)]) == 0
    said = capsys.readouterr().out
    pages = sorted((root / "inspections").glob("*.html"))
    assert pages
    assert all(f"Inspection page: {page}" in said for page in pages)
