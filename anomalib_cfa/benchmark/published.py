"""Figures that others have published for CFA on MVTec AD, in percent, with what they mean."""

from typing import NamedTuple

from anomalib_cfa.benchmark.spec import JobSpec


class Figures(NamedTuple):
    """Figures of one category, in percent; None where the source has none."""

    image_auroc: float
    pixel_auroc: float
    aupro: float | None = None


PAPER_MEANS = (
    "Paper: the authors' README (github.com/sungwool/cfa_for_anomaly_localization), WideResNet-50-2; each figure is "
    "that of the best epoch on the test set, which no user can pick"
)
ANOMALIB_MEANS = (
    "Anomalib: its own Cfa as its model page has it (src/anomalib/models/image/cfa/README.md), resized to 256, seed 0; "
    "training stopped after 5 epochs without a better pixel AUROC on the test side"
)

_TEST_IMAGES = {
    "bottle": 83,
    "cable": 150,
    "capsule": 132,
    "carpet": 117,
    "grid": 78,
    "hazelnut": 110,
    "leather": 124,
    "metal_nut": 115,
    "pill": 167,
    "screw": 160,
    "tile": 117,
    "toothbrush": 42,
    "transistor": 100,
    "wood": 79,
    "zipper": 151,
}

# Image AUROC, pixel AUROC.
_PAPER = {
    "R+C": {
        "bottle": Figures(100.0, 98.6),
        "cable": Figures(99.8, 98.7),
        "capsule": Figures(97.3, 98.9),
        "carpet": Figures(99.5, 98.7),
        "grid": Figures(99.2, 97.8),
        "hazelnut": Figures(100.0, 98.6),
        "leather": Figures(100.0, 99.1),
        "metal_nut": Figures(100.0, 98.8),
        "pill": Figures(97.9, 98.6),
        "screw": Figures(97.3, 99.0),
        "tile": Figures(99.4, 95.8),
        "toothbrush": Figures(100.0, 98.8),
        "transistor": Figures(100.0, 98.3),
        "wood": Figures(99.7, 94.8),
        "zipper": Figures(99.6, 98.6),
    },
    "R": {
        "bottle": Figures(100.0, 98.9),
        "cable": Figures(99.8, 99.0),
        "capsule": Figures(99.2, 99.1),
        "carpet": Figures(99.4, 99.0),
        "grid": Figures(99.9, 98.1),
        "hazelnut": Figures(100.0, 98.9),
        "leather": Figures(100.0, 99.3),
        "metal_nut": Figures(100.0, 99.1),
        "pill": Figures(97.9, 98.8),
        "screw": Figures(93.5, 98.8),
        "tile": Figures(100.0, 96.3),
        "toothbrush": Figures(97.2, 99.1),
        "transistor": Figures(100.0, 98.4),
        "wood": Figures(99.2, 95.0),
        "zipper": Figures(99.5, 99.0),
    },
}

# Image AUROC, pixel AUROC, AUPRO.
_ANOMALIB = {
    "resnet18": {
        "bottle": Figures(99.1, 98.6, 94.0),
        "cable": Figures(94.7, 98.4, 90.2),
        "capsule": Figures(85.8, 98.7, 94.6),
        "carpet": Figures(95.3, 97.0, 91.0),
        "grid": Figures(94.7, 97.3, 91.1),
        "hazelnut": Figures(99.5, 98.7, 93.1),
        "leather": Figures(99.9, 99.2, 97.4),
        "metal_nut": Figures(93.2, 98.1, 91.2),
        "pill": Figures(88.7, 98.1, 93.5),
        "screw": Figures(62.5, 97.3, 88.4),
        "tile": Figures(100.0, 97.8, 89.2),
        "toothbrush": Figures(99.4, 99.0, 89.5),
        "transistor": Figures(89.5, 96.4, 89.5),
        "wood": Figures(100.0, 96.4, 89.8),
        "zipper": Figures(91.9, 97.8, 92.5),
    },
    "wide_resnet50_2": {
        "bottle": Figures(99.8, 98.9, 94.7),
        "cable": Figures(97.9, 98.8, 94.0),
        "capsule": Figures(87.2, 98.9, 93.9),
        "carpet": Figures(97.8, 98.0, 91.9),
        "grid": Figures(96.1, 95.4, 86.2),
        "hazelnut": Figures(100.0, 98.5, 93.0),
        "leather": Figures(99.0, 98.9, 95.5),
        "metal_nut": Figures(99.5, 99.2, 93.1),
        "pill": Figures(94.6, 98.8, 94.7),
        "screw": Figures(70.3, 97.9, 90.6),
        "tile": Figures(99.9, 98.5, 90.6),
        "toothbrush": Figures(100.0, 99.1, 89.9),
        "transistor": Figures(95.7, 97.7, 93.0),
        "wood": Figures(99.4, 97.4, 89.3),
        "zipper": Figures(96.7, 99.0, 95.8),
    },
}


def view(spec: JobSpec) -> str:
    """The paper's name for what a job scores: ``"R"``, resized images; ``"R+C"``, cropped ones; ``"CFA++"``, both."""
    arguments = spec.model["init_args"]
    if arguments.get("center_view"):
        return "CFA++"
    return "R" if arguments.get("center_crop_size") is None else "R+C"


def is_mvtec_ad(spec: JobSpec, test_images: int) -> bool:
    """Whether a job's test images are those of MVTec AD, by their number, rather than another set of that layout."""
    return spec.data_name == "MVTecAD" and _TEST_IMAGES.get(spec.category) == test_images


def paper(spec: JobSpec) -> Figures | None:
    """The paper's figures for a job's category and view, where the job is of CFA."""
    if spec.model_name != "Cfa":
        return None
    shown = view(spec)
    if shown != "CFA++":
        return _PAPER[shown].get(spec.category)
    views = [figures[spec.category] for figures in _PAPER.values() if spec.category in figures]
    if not views:
        return None
    # The better view for each figure, which no user can pick.
    return Figures(max(each.image_auroc for each in views), max(each.pixel_auroc for each in views))


def anomalib(spec: JobSpec) -> Figures | None:
    """Anomalib's figures for a job's category and backbone, where the job is of CFA."""
    if spec.model_name != "Cfa":
        return None
    backbone = str(spec.model["init_args"].get("backbone", "wide_resnet50_2")).partition(".")[0]
    return _ANOMALIB.get(backbone, {}).get(spec.category)
