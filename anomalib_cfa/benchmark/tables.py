"""Results -> tables: one row for each job, and one for each setting and category, averaged over seeds."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from anomalib.utils.config import flatten_dict

from anomalib_cfa.benchmark.folder import Result
from anomalib_cfa.benchmark.published import PUBLISHED, is_mvtec_ad, published_figures, view
from anomalib_cfa.benchmark.spec import JobSpec

AVERAGE = "average"
"""The row over all categories of a setting."""

METRICS = {
    "image_AUROC": "image AUROC",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AUPRO": "AUPRO",
    "image_F1Score": "image F1",
    "pixel_F1Score": "pixel F1",
}
"""Columns of metrics, in percent, by anomalib's names."""

TIMES = ("fit, s", "test, s", "test, ms/image")
MEASURED = (*METRICS.values(), *TIMES, "host GiB", "GPU GiB")
"""Columns that are averaged over seeds."""

# Which images, which seed and how fast images are read do not belong to a setting.
_DATA = "category name root normal_dir abnormal_dir normal_test_dir mask_dir num_workers eval_batch_size"
_IGNORED = {"seed", "model.init_args.seed", *(f"data.init_args.{name}" for name in _DATA.split())}
_NAMED = {"model", "model.class_path", "data.class_path"} | {
    f"model.init_args.{name}" for name in ("backbone", "center_crop_size", "center_view")
}


def label_settings(specs: Sequence[JobSpec]) -> list[str]:
    """Name the setting of each job: the model, its backbone, the paper's view, and whatever else differs among them.

    A setting is a job's whole configuration except for the images and the seed. Where two jobs of one name would be of
    the same category and seed, what else differs between them, such as folders, is named in full.
    """
    flat = [flatten_dict({"accelerator": spec.accelerator, **spec.config}) for spec in specs]
    names = sorted({name for setting in flat for name in setting} - _IGNORED - _NAMED)
    differing = [name for name in names if len({repr(setting.get(name)) for setting in flat}) > 1]
    labels = []
    for spec, setting in zip(specs, flat, strict=True):
        values = {name: str(setting[name]).rpartition("/")[2] for name in differing if name in setting}  # no folders
        others = [f"{name.rpartition('.')[2]} {value}" for name, value in values.items()]
        labels.append(", ".join([*_model_and_data(spec), *others]))
    keys = [(label, spec.category, spec.seed) for label, spec in zip(labels, specs, strict=True)]
    for key in {key for key in keys if keys.count(key) > 1}:
        alike = [place for place, other in enumerate(keys) if other == key]
        names = sorted({name for place in alike for name in flat[place]})
        names = [name for name in names if len({repr(flat[place].get(name)) for place in alike}) > 1]
        for place in alike:
            labels[place] = ", ".join([labels[place], *(f"{name} {flat[place].get(name)}" for name in names)])
    return labels


def _model_and_data(spec: JobSpec) -> list[str]:
    arguments = spec.model["init_args"]
    label = [spec.model_name]
    if "backbone" in arguments:
        label.append(str(arguments["backbone"]))
    if spec.model_name == "Cfa":
        crop = arguments.get("center_crop_size")
        label.append(view(spec) if crop is None else f"{view(spec)} {crop}")
    if spec.data_name != "MVTecAD":
        label.append(spec.data_name)
    return label


def tabulate(results: Sequence[Result]) -> pd.DataFrame:
    """One row for each job: its setting, category and seed, all that was measured, and what was published."""
    labels = label_settings([result.spec for result in results])
    rows = [_row(result, label) for result, label in zip(results, labels, strict=True)]
    return pd.DataFrame(rows).sort_values(["setting", "category", "seed"], ignore_index=True)


def _row(result: Result, label: str) -> dict[str, Any]:
    spec, images = result.spec, result.images
    return {
        "setting": label,
        "category": spec.category,
        "seed": spec.seed,
        **{column: _scaled(result.metrics.get(name), 100) for name, column in METRICS.items()},
        "fit, s": result.seconds["fit"],
        "test, s": result.seconds["test"],
        "test, ms/image": 1000 * result.seconds["test"] / images["test"],
        "host GiB": _scaled(result.peak_memory["host"], 2**-30),
        "GPU GiB": _scaled(result.peak_memory["device"], 2**-30),
        **(published_figures(spec) if is_mvtec_ad(spec, images["test"]) else dict.fromkeys(PUBLISHED, float("nan"))),
        "epochs": result.epochs,
        "train images": images["train"],
        "test images": images["test"],
        "thresholds from": result.threshold_from,
        "weights": result.weights,
        "finished": result.finished,
        "key": spec.key,
    }


def _scaled(value: float | None, factor: float) -> float:
    return float("nan") if value is None else value * factor


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Average a table of :func:`tabulate` over seeds.

    Returns:
        One row for each setting and category, and one for each setting's average over its categories: the number of
        ``seeds``, the mean of each column of :data:`MEASURED`, its sample standard deviation over seeds as
        ``<column> ±``, nan for one seed, and the published figures. The average is over the seeds that have every
        category, or over the categories' means if no seed has, and ``seeds`` is 0; nan where a category has no figure.
    """
    parts = []
    for setting, jobs in table.groupby("setting", sort=True):
        by_category = [_average(rows, str(category)) for category, rows in jobs.groupby("category", sort=True)]
        categories = jobs["category"].nunique()
        complete = jobs.groupby("seed").filter(lambda rows, wanted=categories: rows["category"].nunique() == wanted)
        if complete.empty:
            per_seed = pd.DataFrame(by_category)[list(MEASURED)].mean(skipna=False).to_frame().T
        else:
            per_seed = complete.groupby("seed")[list(MEASURED)].agg(lambda values: values.mean(skipna=False))
        overall = _average(per_seed, AVERAGE) | {"seeds": complete["seed"].nunique()}
        for column in PUBLISHED:  # nan unless every category has a figure
            overall[column] = pd.Series([row[column] for row in by_category]).mean(skipna=False)
        part = pd.DataFrame([*by_category, overall])
        part.insert(0, "setting", setting)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _average(rows: pd.DataFrame, category: str) -> dict[str, Any]:
    averaged: dict[str, Any] = {"category": category, "seeds": len(rows)}
    for column in MEASURED:
        averaged[column] = rows[column].mean(skipna=False)
        averaged[f"{column} ±"] = rows[column].std(ddof=1, skipna=False)
    for column in PUBLISHED:
        averaged[column] = rows[column].iloc[0] if column in rows else float("nan")
    return averaged
