import argparse
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import comparison
import comparison_run
from comparison_table import ACCURACY, markdown


def result(value=0.5):
    accuracy = dict.fromkeys(ACCURACY, value)
    costs = {"fit_s": 10.0, "fit_peak_bytes": 2**30, "latency_s": 0.025, "bank": 256}
    counts = {"training_images": 6, "test_images": 8, "epochs": 1}
    return accuracy | costs | counts | {"machine": {"processor": "one"}, "versions": {"torch": "2"}}


def arguments(output, **others):
    settings = {"data": Path("tile"), "weights_path": Path("file"), "quick": True, "model": None, "seeds": 2}
    settings |= {"threads": 1, "epochs": None, "option": None, "anomalib_epochs": 1, "coreset": 0.01, "output": output}
    return Namespace(**(settings | others))


def test_a_failed_run_is_reported_and_made_again_and_finished_ones_are_not(tmp_path, monkeypatch, capsys):
    made = []

    def carry_out(task, _):
        made.append((task["model"], task["seed"]))
        return {"error": "no memory"} if made == [*made[:1]] else result()

    monkeypatch.setattr(comparison, "carry_out", carry_out)
    monkeypatch.setattr(comparison, "parse_arguments", lambda: arguments(tmp_path))
    assert comparison.main() == 1
    assert "no memory" in capsys.readouterr().err
    assert comparison.main() == 0
    assert made == [(model, seed) for seed in (0, 1) for model in comparison.MODELS] + [(comparison.CFA, 0)]
    lines = (tmp_path / "comparison.jsonl").read_text().splitlines()
    assert len({json.dumps(json.loads(line)["task"]) for line in lines}) == len(lines) == 2 * len(comparison.MODELS)


def test_the_table_gives_mean_and_deviation_over_seeds():
    tasks = [{"model": "PatchCore", "seed": seed, "coreset": 0.01} for seed in (0, 1)]
    shared = {"data": "tile", "weights": "file", "size": 128, "threads": 1}
    runs = [{"task": task | shared, "result": result(value)} for task, value in zip(tasks, (0.4, 0.6), strict=True)]
    text = markdown(runs)
    accuracy = " | ".join(["0.500 ± 0.141"] * len(ACCURACY))
    line = f"| PatchCore (2 seeds, coreset 0.01) | {accuracy} | 10.0 s | 1.00 GiB | 25.0 ms | 256 |"
    assert line in text
    assert "6 training and 8 test images" in text


def test_options_are_those_of_this_cfa_alone(tmp_path):
    options = [comparison.option(text) for text in ("gamma_c=0.25", "score=softmin", 'layers=["layer1", "layer2"]')]
    tasks = list(comparison.plan(arguments(tmp_path, option=options, seeds=1)))
    assert [task["model"] for task in tasks if "options" in task] == [comparison.CFA]
    label = '(1 seed, 1 epochs, gamma_c 0.25, layers ["layer1", "layer2"], score softmin)'
    assert f"this Cfa {label}" in markdown([{"task": tasks[0], "result": result()}])
    built = comparison_run.build({**tasks[0], "weights_path": None}).hparams
    assert (built["gamma_c"], built["score"], built["layers"]) == (0.25, "softmin", ["layer1", "layer2"])


@pytest.mark.parametrize("text", ["gamma_c", "gamma=1", "seed=3"])
def test_an_option_that_cfa_has_not_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=rf"must be NAME=VALUE .* but is {text}"):
        comparison.option(text)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with random weights of ResNet-18."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), path)
    return path


@pytest.mark.parametrize("model", [comparison.PATCHCORE, comparison.PADIM, comparison.CFA])
def test_every_model_has_the_weights_of_the_file(model, weights):
    task = {"model": model, "size": 64, "weights_path": str(weights), "coreset": 0.1, "seed": 0}
    built = comparison_run.build(task)
    if model == comparison.CFA:
        built.model.patch_features.load_weights()
        network = built.model.patch_features.network
    else:
        network = built.model.feature_extractor.feature_extractor
    expected = torch.load(weights, weights_only=True)
    state = {name.removeprefix("model."): tensor for name, tensor in network.state_dict().items()}
    assert {"conv1.weight", "layer3.1.bn2.running_var"} <= state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name
    assert built.evaluator.test_metrics
    assert built.post_processor is None


def test_a_quick_run_takes_fewer_images_also_in_a_fit(rendered_mvtec):
    task = {"root": str(rendered_mvtec / "tile"), "training_images": 3, "test_step": 4}
    datamodule = comparison_run.Images(task)
    for _ in range(2):
        datamodule.setup()
        assert (len(datamodule.train_data), len(datamodule.test_data)) == (3, 2)
    whole = comparison_run.Images(task | {"training_images": None, "test_step": 1})
    whole.setup()
    assert (len(whole.train_data), len(whole.test_data)) == (6, 8)
