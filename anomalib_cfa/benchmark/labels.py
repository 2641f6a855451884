"""Names for settings: what jobs of one benchmark have in common, but for the images and the seed."""

from collections.abc import Sequence
from typing import Any

from anomalib.utils.config import flatten_dict

from anomalib_cfa.benchmark.published import view
from anomalib_cfa.benchmark.spec import JobSpec

# Which images, which seed, and how fast images are read are no part of a setting.
_NO_SETTING = {
    "seed",
    "model.init_args.seed",
    *(
        f"data.init_args.{name}"
        for name in (
            "category",
            "name",
            "root",
            "normal_dir",
            "abnormal_dir",
            "normal_test_dir",
            "mask_dir",
            "num_workers",
            "eval_batch_size",
        )
    ),
}
_TOLD_OTHERWISE = {
    "model",
    "model.class_path",
    "model.init_args.backbone",
    "model.init_args.center_crop_size",
    "model.init_args.center_view",
    "data.class_path",
}


def label_settings(specs: Sequence[JobSpec]) -> list[str]:
    """Name the setting of each job: the model, its backbone, the paper's view, and whatever else differs among them."""
    settings = [{name: value for name, value in _flat(spec).items() if name not in _NO_SETTING} for spec in specs]
    names = sorted({name for setting in settings for name in setting} - _TOLD_OTHERWISE)
    differing = [name for name in names if len({repr(setting.get(name)) for setting in settings}) > 1]
    labels = []
    for spec, setting in zip(specs, settings, strict=True):
        told = [f"{name.rpartition('.')[2]} {_short(setting[name])}" for name in differing if name in setting]
        labels.append(", ".join([*_told(spec), *told]))
    return labels


def _short(value: object) -> str:
    """A value as it is, but of a path its last part."""
    return str(value).rpartition("/")[2]


def _flat(spec: JobSpec) -> dict[str, Any]:
    flat: dict[str, Any] = flatten_dict({"accelerator": spec.accelerator, **spec.config})
    return flat


def _told(spec: JobSpec) -> list[str]:
    arguments = spec.model["init_args"]
    told = [spec.model_name]
    if "backbone" in arguments:
        told.append(str(arguments["backbone"]))
    if spec.model_name == "Cfa":
        crop = arguments.get("center_crop_size")
        told.append(view(spec) if crop is None else f"{view(spec)} {crop}")
    if spec.data_name != "MVTecAD":
        told.append(spec.data_name)
    return told
