"""One job: a model trained and tested on one category with one seed, and its result saved."""

import gc
import inspect
import math
import pkgutil
import time
import traceback
from datetime import datetime, timezone
from tempfile import TemporaryDirectory
from typing import Any

import anomalib.models
import pandas as pd
from anomalib.data import AnomalibDataModule, AnomalibDataset, get_datamodule
from anomalib.data.utils import ValSplitMode
from anomalib.engine import Engine
from anomalib.models import get_model
from anomalib.models.components import AnomalibModule
from anomalib.pipelines.benchmark.job import BenchmarkJob
from anomalib.utils.config import flatten_dict
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, Timer

from anomalib_cfa.benchmark.cases import CaseKeeper
from anomalib_cfa.benchmark.folder import Failure, Result, RunFolder
from anomalib_cfa.benchmark.provenance import machine, peak_memory, versions, weights_of
from anomalib_cfa.benchmark.spec import JobSpec
from anomalib_cfa.inspect.inspection import inspect_samples
from anomalib_cfa.inspect.predictors import ModelPredictor
from anomalib_cfa.inspect.samples import listed_samples
from anomalib_cfa.lightning_model import Cfa


def build_model(spec: JobSpec) -> AnomalibModule:
    """Build the model of a job.

    A model that takes a seed gets the run's unless the file sets its own. All models are tested with this package's
    metrics, and none draws its test images, which would count as test time.
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
    """
    config = spec.data
    class_path = str(config["class_path"])
    if "." not in class_path or class_path.startswith("anomalib."):
        datamodule: AnomalibDataModule = get_datamodule(config)
        return datamodule
    found: Any = pkgutil.resolve_name(class_path)
    if not (isinstance(found, type) and issubclass(found, AnomalibDataModule)):
        msg = f"class_path of data must name an anomalib data module, but names {found!r}"
        raise TypeError(msg)
    return found(**config["init_args"])


def _threshold_side(model: AnomalibModule, datamodule: AnomalibDataModule) -> str:
    """Which images chose the thresholds: those of the ``"test"``, of ``"validation"``, or ``"none"``."""
    if model.post_processor is None or not hasattr(datamodule, "val_data"):
        return "none"
    from_test = ValSplitMode(datamodule.val_split_mode) in {ValSplitMode.SAME_AS_TEST, ValSplitMode.FROM_TEST}
    return "test" if from_test else "validation"


class Job(BenchmarkJob):
    """Anomalib's benchmark job, which builds its model and data only when it runs, so that their errors are its own.

    It holds plain values only and can be sent to another process. ``title`` is the job in a few words, ``number`` its
    place, from 1, among the ``total`` jobs to run.
    """

    def __init__(self, spec: JobSpec, folder: RunFolder, title: str, number: int = 1, total: int = 1) -> None:
        # Not the parent's constructor, which wants a model and data that are already built.
        self.accelerator = spec.accelerator
        self.spec = spec
        self.folder = folder
        self.title = title
        self.number = number
        self.total = total

    def run(self, task_id: int | None = None) -> dict[str, Any]:
        """Train, test, and save the result or the failure, of which the error is raised again.

        ``task_id`` is the index of the GPU, where there are several. Returns the result in one flat dictionary, as
        anomalib's job does.
        """
        device = "" if task_id is None else f" on device {task_id}"
        left = self.total - self.number
        print(f"\n[{self.number} of {self.total}, {left} left after it] {self.title}{device}", flush=True)
        try:
            result = self._measure(task_id)
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
        finally:
            gc.collect()  # trainer and model refer to each other, and the next job needs the memory
        self.folder.save_result(result)
        figures = ", ".join(f"{name} {value:.3f}" for name, value in result.metrics.items() if value is not None)
        print(f"{self.title}: {figures}, fit in {result.seconds['fit']:.0f} s", flush=True)
        durations = {f"{stage}_duration": seconds for stage, seconds in result.seconds.items()}
        return {"accelerator": self.accelerator, **durations, **flatten_dict(self.spec.config), **result.metrics}

    def fail(self, reason: str, details: str = "") -> None:
        """Save that the job failed, and why."""
        one_line = " ".join(reason.split())
        self.folder.save_failure(Failure(self.spec.accelerator, self.spec.config, self.title, one_line, details))

    def _measure(self, task_id: int | None) -> Result:
        seed_everything(self.spec.config["seed"], workers=True)
        model, datamodule = build_model(self.spec), build_datamodule(self.spec)
        keeper = CaseKeeper()
        devices = "auto" if task_id is None or self.accelerator == "cpu" else [task_id]
        trainer = dict(self.spec.config.get("trainer") or {})
        callbacks: list[Callback] = [keeper] if "check_val_every_n_epoch" in trainer else [keeper, _LastValidation()]
        self.folder.work.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.folder.work) as work, peak_memory(self.accelerator, task_id or 0) as peak:
            engine = Engine(
                accelerator=self.accelerator, devices=devices, default_root_dir=work, callbacks=callbacks, **trainer
            )
            start = time.perf_counter()
            engine.fit(model, datamodule=datamodule)
            fitted = time.perf_counter()
            epochs = engine.trainer.current_epoch
            metrics = engine.test(model, datamodule=datamodule)[0]
            tested = time.perf_counter()
        self._inspect(model, datamodule, str(engine.trainer.strategy.root_device))
        return Result(
            accelerator=self.accelerator,
            config=self.spec.config,
            metrics={name: value if math.isfinite(value) else None for name, value in metrics.items()},
            seconds={"fit": fitted - start, "test": tested - fitted},
            peak_memory=peak,
            images={"train": len(datamodule.train_data), "test": len(datamodule.test_data)},
            epochs=epochs,
            threshold_from=_threshold_side(model, datamodule),
            weights=weights_of(model),
            versions=versions(),
            machine=machine(self.accelerator),
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            cases=keeper.draw(self.folder.root / "cases" / self.spec.key, self.folder.root),
        )

    def _inspect(self, model: AnomalibModule, datamodule: AnomalibDataModule, device: str) -> None:
        """Write the page on which to judge the model, unless its images are not those in the files."""
        dataset = datamodule.test_data
        if type(dataset).__getitem__ is not AnomalibDataset.__getitem__:
            return
        page = self.folder.inspection(self.spec.key)
        try:
            predictor, samples = ModelPredictor(model, device), listed_samples(dataset.samples)
            inspect_samples(predictor, samples, page, self.title, self.spec.model_name)
        # The result is measured by now, and valid without a page: also that of a model that does not normalize.
        except Exception as error:  # noqa: BLE001
            print(f"{self.title}: no inspection page: {type(error).__name__}: {error}", flush=True)

    @staticmethod
    def collect(results: list[dict[str, Any]]) -> pd.DataFrame:
        """Gather results, of which there may be none, or of models with different arguments."""
        return pd.DataFrame(results)

    @staticmethod
    def save(result: pd.DataFrame) -> None:
        """Save nothing: each job has saved its own result."""


class _LastValidation(Callback):
    """Validates after the last epoch only, if the number of epochs is known.

    Validation only sets the thresholds. Its figures choose nothing here, and its time should not count as training.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del pl_module
        stops_sooner = any(isinstance(callback, EarlyStopping | Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and not stops_sooner and trainer.max_steps == -1:
            trainer.check_val_every_n_epoch = trainer.max_epochs
