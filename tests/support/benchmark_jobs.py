"""Settings, jobs and results of benchmarks, small enough for tests."""

from dataclasses import replace

import yaml

from anomalib_cfa.benchmark.folder import Result
from anomalib_cfa.benchmark.spec import JobSpec

TINY = {"backbone": "test_resnet.r160_in1k", "pre_trained": False, "image_size": 64}


def section(root, arguments=None, **changes):
    """The ``benchmark`` section of a file, for the rendered category ``tile``."""
    data = {"root": str(root), "category": "tile", "train_batch_size": 4, "num_workers": 0}
    return {
        "seed": 0,
        "model": {"class_path": "Cfa", "init_args": TINY | (arguments or {})},
        "data": {"class_path": "MVTecAD", "init_args": data},
        "trainer": {"max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False},
    } | changes


def write_config(path, benchmark, accelerator="cpu"):
    path.write_text(yaml.safe_dump({"accelerator": accelerator, "benchmark": benchmark}))
    return str(path)


def spec_of(category="screw", seed=0, data="MVTecAD", **model):
    arguments = {"backbone": "resnet18", "seed": seed} | model
    named = {"class_path": data, "init_args": {"category": category}}
    return JobSpec("cpu", {"seed": 0, "model": {"class_path": "Cfa", "init_args": arguments}, "data": named})


def result_of(spec=None, image_auroc=0.9, test_images=160, **changes):
    spec = spec or spec_of()
    metrics = {"image_AUROC": image_auroc, "pixel_AUROC": 0.95, "pixel_AUPRO": 0.9, "image_F1Score": None}
    result = Result(
        accelerator=spec.accelerator,
        config=spec.config,
        metrics=metrics,
        seconds={"fit": 10.0, "test": 1.6},
        peak_memory={"host": 2**30, "device": None},
        images={"train": 8, "test": test_images},
        epochs=30,
        threshold_from="test",
        weights="resnet18.tv_in1k",
        versions={"torch": "2.10"},
        machine={"cores": "2"},
        finished="2026-01-01T00:00:00+00:00",
        cases=[],
    )
    return replace(result, **changes)
