import argparse
import json
from pathlib import Path

import pytest
import torch
from harness import Store, carry_out, figure, markdown_table, spread, write_report
from harness.arguments import Backbones, base_parser, file, folder_of_a_set
from harness.images import ImageSet
from harness.metrics import RawAUROC
from harness.tables import write_csv
from harness.timing import alternate

ENVIRONMENT = {"machine": {"processor": "a CPU", "cores": "2"}, "versions": {"torch": "2.14"}}


def options(folder, *more):
    parser = base_parser(None)
    parser.add_argument("--ckpt_path", type=file, default=Path(__file__))
    return parser.parse_args(["--output", str(folder), *more])


def test_a_store_keeps_what_is_finished(tmp_path):
    store, task = Store(tmp_path / "deep/results.jsonl"), {"model": "A", "seed": 1}
    assert task not in store
    store.put(task, {"figure": 0.5})
    again = Store(tmp_path / "deep/results.jsonl")
    assert again[{"seed": 1, "model": "A"}] == {"figure": 0.5}  # whatever the order of the settings
    assert {"model": "A", "seed": 2} not in again
    assert again.finished([task, {"model": "B"}]) == [(task, {"figure": 0.5})]


@pytest.mark.parametrize("cut", [1, 10, 25])
def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path, cut):
    path = tmp_path / "results.jsonl"
    store = Store(path)
    store.put({"seed": 1}, {"figure": 1})
    store.put({"seed": 2}, {"figure": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    again = Store(path)
    assert {"seed": 1} in again
    again.put({"seed": 3}, {"figure": 3})
    final = Store(path)
    assert {"seed": 1} in final
    assert {"seed": 3} in final
    assert final[{"seed": 3}] == {"figure": 3}


def test_a_failure_is_told_and_tried_again_and_a_finished_task_is_not(tmp_path, monkeypatch, capsys):
    tasks, tried = [{"label": "works"}, {"label": "fails"}], []

    def measured(question, task):
        tried.append(task["label"])
        if task["label"] == "fails":
            msg = "exit status 3: no memory"
            raise RuntimeError(msg)
        assert task["ckpt_path"] == __file__
        return {"figure": 1}

    monkeypatch.setattr("harness.runner._in_process", measured)
    for _ in range(2):
        finished, complete = carry_out("accuracy", tasks, options(tmp_path, "--ckpt_path", __file__))
        assert ([task["label"] for task, _ in finished], complete) == (["works"], False)
    assert tried == ["works", "fails", "fails"]
    assert "no memory" in capsys.readouterr().err
    ((kept, _),) = finished
    assert kept in Store(tmp_path / "accuracy.jsonl")


def test_no_task_is_started_after_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.runner._in_process", lambda *_: pytest.fail("started"))
    assert carry_out("accuracy", [{"label": "one"}], options(tmp_path, "--minutes", "-1")) == ([], False)


def test_a_process_that_fails_says_why(tmp_path, capsys):
    task = {"label": "none", "what": "nothing", "threads": 1}
    assert carry_out("speed", [task], options(tmp_path, "--threads", "1")) == ([], False)
    assert "KeyError: 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1234"), (56.78, "56.8"), (5.678, "5.68"), (0.5678, "0.568"), (0.0012345, "0.00123")]
)
def test_figures_have_three_digits(value, text):
    assert figure(value) == text


def test_a_spread_is_mean_and_sample_deviation():
    assert spread([0.5, 0.7]) == "0.600 ± 0.141"
    assert spread([0.5]) == "0.500"
    assert spread([]) == ""


def test_a_report_says_what_it_was_measured_on(tmp_path, capsys):
    table = markdown_table(["a", "b"], [["1", "2"]])
    write_report(tmp_path / "out/report.md", "Title", ["a note"], [table], [{"environment": ENVIRONMENT}] * 2)
    text = (tmp_path / "out/report.md").read_text()
    assert text.startswith("# Title\n\n- a note\n- processor a CPU, cores 2; torch 2.14\n\n| a | b |\n| --- | --- |\n")
    assert "report.md" in capsys.readouterr().out


def test_a_csv_has_the_columns_of_all_rows(tmp_path):
    write_csv(tmp_path / "rows.csv", [{"a": 1}, {"a": 2, "b": 3}])
    assert (tmp_path / "rows.csv").read_text().splitlines() == ["a,b", "1,", "2,3"]


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="has no train/good"):
        folder_of_a_set(str(tmp_path))
    with pytest.raises(argparse.ArgumentTypeError, match="must be a file"):
        file(str(tmp_path / "weights"))
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", action=Backbones)
    weights = tmp_path / "weights"
    weights.touch()
    assert parser.parse_args(["--backbone", f"a={weights}", "--backbone", f"b={weights}"]).backbone.keys() == {"a", "b"}
    with pytest.raises(SystemExit):
        parser.parse_args(["--backbone", "resnet18"])


def test_alternate_calls_each_in_turn():
    called = []
    assert len(alternate([lambda: called.append("a"), lambda: called.append("b")], repeats=2, warm_up=1)) == 2
    assert called == ["a", "b"] * 3


def test_auroc_of_raw_scores_does_not_tie_large_ones():
    metric = RawAUROC(["pred_score", "gt_label"])
    scores = torch.tensor([100.0, 101.0, 102.0, 103.0])
    batch = argparse.Namespace(pred_score=scores, gt_label=torch.tensor([0, 0, 1, 1]))
    metric.update(batch)
    assert metric.compute() == 1


def test_few_training_images_are_drawn_by_the_seed(rendered_mvtec):
    drawn = []
    for seed in (0, 0, 1):
        images = ImageSet(rendered_mvtec / "tile", training_images=2, seed=seed)
        images.setup()
        drawn.append(sorted(images.train_data.samples.image_path))
        assert len(images.test_data) == 8
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert json.dumps(drawn)
