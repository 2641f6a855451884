"""CFA's published figures on MVTec AD, in percent, from ``published.csv``."""

from functools import cache
from importlib.resources import files

import pandas as pd

from anomalib_cfa.benchmark.spec import JobSpec

SOURCES = {
    "paper": "Paper: the authors' README (github.com/sungwool/cfa_for_anomaly_localization), WideResNet-50-2; each "
    "figure is that of the best epoch on the test set, which cannot be chosen without its labels",
    "anomalib": "Anomalib: the model page of its own Cfa (src/anomalib/models/image/cfa/README.md), resized to 256, "
    "seed 0; training stopped after 5 epochs without a better pixel AUROC on the test split",
}
"""Where the figures come from and what they mean."""

PUBLISHED = ("paper image AUROC", "paper pixel AUROC", "anomalib image AUROC", "anomalib pixel AUROC", "anomalib AUPRO")
"""Columns of published figures: the source of each, and the metric."""


@cache
def published_table() -> pd.DataFrame:
    """A row for each category of MVTec AD: its number of test images, and ``<source> <setting> <metric>``."""
    with files(__package__).joinpath("published.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, index_col="category")


def view(spec: JobSpec) -> str:
    """The paper's name for what a job scores: ``"R"``, resized images; ``"R+C"``, cropped ones; ``"CFA++"``, both."""
    arguments = spec.model["init_args"]
    if arguments.get("center_view"):
        return "CFA++"
    return "R" if arguments.get("center_crop_size") is None else "R+C"


def is_mvtec_ad(spec: JobSpec, test_images: int) -> bool:
    """Whether a job's images are MVTec AD's own, judged by their number, and not another set in its layout."""
    return spec.data_name == "MVTecAD" and bool(published_table()["test_images"].get(spec.category) == test_images)


def published_figures(spec: JobSpec) -> dict[str, float]:
    """The figures of :data:`PUBLISHED` for a job's category and setting; nan where there are none.

    CFA++ is compared with the better of the paper's two views for each figure, as in the authors' README.
    """
    table = published_table()
    if spec.model_name != "Cfa" or spec.category not in table.index:
        return dict.fromkeys(PUBLISHED, float("nan"))
    backbone = str(spec.model["init_args"].get("backbone", "wide_resnet50_2")).partition(".")[0]
    shown = view(spec)
    settings = {"paper": ("R", "R+C") if shown == "CFA++" else (shown,), "anomalib": (backbone,)}
    row = table.loc[spec.category]
    figures = {}
    for column in PUBLISHED:
        source, _, metric = column.partition(" ")
        figures[column] = max(row.get(f"{source} {setting} {metric}", float("nan")) for setting in settings[source])
    return figures
