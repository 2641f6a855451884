"""Builds a job's model and data module from plain values, as anomalib's benchmark does and a little beyond."""

import importlib
import inspect
from typing import Any

import anomalib.models
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.models import get_model
from anomalib.models.components import AnomalibModule

from anomalib_cfa.benchmark.spec import JobSpec
from anomalib_cfa.lightning_model import Cfa


def build_model(spec: JobSpec) -> AnomalibModule:
    """Build the model of a job, to be measured like every other.

    A model with a seed of its own gets the run's where the file does not give it one. All models are tested with the
    metrics of this package's, and none draws its test images, which would count as test time.

    Raises:
        Exception: Whatever the model's constructor raises.
    """
    config = spec.model
    model_class = getattr(anomalib.models, spec.model_name, None)
    if model_class is not None and "seed" in inspect.signature(model_class).parameters:
        config["init_args"].setdefault("seed", spec.seed)
    model: AnomalibModule = get_model(config)
    model.evaluator = Cfa.configure_evaluator()
    model.visualizer = None
    return model


def build_datamodule(spec: JobSpec) -> AnomalibDataModule:
    """Build the data module of a job: one of anomalib's by its name, or any other by its full class path.

    Raises:
        TypeError: If the class path names something else.
        Exception: Whatever the import or the constructor raises.
    """
    config = spec.data
    module, _, name = str(config["class_path"]).rpartition(".")
    if module.partition(".")[0] in ("", "anomalib"):
        datamodule: AnomalibDataModule = get_datamodule(config)
        return datamodule
    found: Any = getattr(importlib.import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, AnomalibDataModule)):
        msg = f"class_path of data must name an anomalib data module, but names {found!r}"
        raise TypeError(msg)
    return found(**config["init_args"])
