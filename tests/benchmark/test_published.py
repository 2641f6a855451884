"""The published figures are those of their sources."""

import pytest
from benchmark_jobs import spec_of

from anomalib_cfa.benchmark.published import PUBLISHED, published_figures, published_table

# Averages over the categories as the sources state them, to one decimal.
STATED = {
    "paper R": (99.0, 98.5),
    "paper R+C": (99.3, 98.2),
    "anomalib resnet18": (93.0, 97.9, 91.7),
    "anomalib wide_resnet50_2": (95.6, 98.3, 92.4),
}


@pytest.mark.parametrize("setting", STATED)
def test_the_published_figures_average_to_what_their_sources_say(setting):
    metrics = ("image AUROC", "pixel AUROC", "AUPRO")[: len(STATED[setting])]
    averages = published_table()[[f"{setting} {metric}" for metric in metrics]].mean()
    assert averages.tolist() == pytest.approx(STATED[setting], abs=0.06)


def test_the_numbers_of_test_images_are_those_of_mvtec_ad():
    assert published_table()["test_images"].sum() == 1725


def test_cfa_plus_plus_stands_beside_the_papers_better_view_of_each_figure():
    figures = [published_figures(spec_of(category, center_view=True)) for category in published_table().index]
    means = [sum(row[f"paper {metric}"] for row in figures) / 15 for metric in ("image AUROC", "pixel AUROC")]
    assert means == pytest.approx([99.5, 98.5], abs=0.06)  # the authors' README


@pytest.mark.parametrize("spec", [spec_of("magnetic_tile"), spec_of(backbone="resnet34", center_crop_size=1)])
def test_without_a_source_there_is_no_figure(spec):
    figures = published_figures(spec)
    assert set(figures) == set(PUBLISHED)
    assert all(value != value for name, value in figures.items() if name.startswith("anomalib"))
