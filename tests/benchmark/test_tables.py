"""Averages over seeds and categories, and names of settings."""

import math

import pytest
from benchmark_jobs import result_of, spec_of

from anomalib_cfa.benchmark.tables import AVERAGE, label_settings, summarize, tabulate


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


def test_an_average_that_lacks_a_figure_or_a_whole_seed_says_so():
    results = [result_of(spec_of("screw"), 0.8), result_of(spec_of("tile"), 1.0)]
    del results[0].metrics["pixel_AUPRO"]
    average = summarize(tabulate(results)).set_index("category").loc[AVERAGE]
    assert average["image AUROC"] == pytest.approx(90)
    assert math.isnan(average["AUPRO"])
    apart = [result_of(spec_of("screw", 0), 0.8), result_of(spec_of("tile", 1), 1.0)]
    average = summarize(tabulate(apart)).set_index("category").loc[AVERAGE]
    assert (average["image AUROC"], average["seeds"]) == (pytest.approx(90), 0)


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


def test_two_options_of_one_name_are_both_in_the_label():
    specs = [spec_of(scale=1), spec_of(scale=2)]
    specs[1].config["data"]["init_args"]["scale"] = 3
    assert label_settings(specs) == ["Cfa, resnet18, R, scale 1", "Cfa, resnet18, R, scale 3, scale 2"]


def test_folders_of_one_name_are_told_apart():
    specs = [spec_of(weights_path="a/model.pth"), spec_of(weights_path="b/model.pth"), spec_of(), spec_of()]
    specs[2].config["data"]["init_args"]["root"] = "gears"
    specs[3].config["data"]["init_args"]["root"] = "bolts"
    labels = label_settings(specs)
    assert len(set(labels)) == 4
    assert labels[0] == "Cfa, resnet18, R, weights_path model.pth, model.init_args.weights_path a/model.pth"
    assert labels[3].endswith("data.init_args.root bolts")
