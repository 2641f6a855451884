"""One job: a model trained and tested on one category with one seed, its result on disk before the next begins."""

import gc
import math
import time
import traceback
from datetime import datetime, timezone
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import ValSplitMode
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from anomalib.pipelines.benchmark.job import BenchmarkJob
from anomalib.utils.config import flatten_dict
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, Timer

from anomalib_cfa.benchmark.building import build_datamodule, build_model
from anomalib_cfa.benchmark.cases import CaseKeeper
from anomalib_cfa.benchmark.folder import Failure, Result, RunFolder
from anomalib_cfa.benchmark.provenance import PeakMemory, machine, versions, weights_of
from anomalib_cfa.benchmark.spec import JobSpec

_THRESHOLD_SIDES = {
    ValSplitMode.SAME_AS_TEST: "test",
    ValSplitMode.FROM_TEST: "test",
    ValSplitMode.FROM_TRAIN: "validation",
    ValSplitMode.SYNTHETIC: "validation",
    ValSplitMode.NONE: "none",
}


class Job(BenchmarkJob):
    """Anomalib's benchmark job, which builds its model and data itself, so that their errors are its own.

    It holds plain values only and can be sent to another process.

    Args:
        spec: What to do.
        folder: Where the result goes.
        title: The job in a few words.
        number: Its place among the jobs that are to be done now, from 1.
        total: The number of those.
    """

    def __init__(self, spec: JobSpec, folder: RunFolder, title: str, number: int = 1, total: int = 1) -> None:
        # Not the parent's constructor, which wants a model and data that are built already.
        self.accelerator = spec.accelerator
        self.seed = spec.seed
        self.flat_cfg = flatten_dict(spec.config)
        self.spec = spec
        self.folder = folder
        self.title = title
        self.number = number
        self.total = total

    def run(self, task_id: int | None = None) -> dict[str, Any]:
        """Train, test, and save the result or the failure.

        Args:
            task_id: Index of the GPU, where there are several.

        Returns:
            The result in one flat dictionary, as anomalib's job gives it.

        Raises:
            Exception: Whatever went wrong; the runner goes on with the next job.
        """
        place = "" if task_id is None else f" on device {task_id}"
        left = self.total - self.number
        print(f"\n[{self.number} of {self.total}, {left} left after it] {self.title}{place}", flush=True)
        try:
            result = self._measure(task_id)
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
        finally:
            gc.collect()  # trainer and model refer to each other, and the next job wants the memory
        self.folder.save_result(result)
        figures = ", ".join(f"{name} {value:.3f}" for name, value in result.metrics.items() if value is not None)
        print(f"{self.title}: {figures}, fit in {result.seconds['fit']:.0f} s", flush=True)
        durations = {f"{stage}_duration": seconds for stage, seconds in result.seconds.items()}
        return {"accelerator": self.accelerator, **durations, **self.flat_cfg, **result.metrics}

    def fail(self, reason: str, details: str = "") -> None:
        """Note on disk that the job failed."""
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
        with (
            TemporaryDirectory(dir=self.folder.work) as work,
            PeakMemory(self.accelerator, task_id or 0) as peak,
        ):
            engine = Engine(
                accelerator=self.accelerator, devices=devices, default_root_dir=work, callbacks=callbacks, **trainer
            )
            start = time.perf_counter()
            engine.fit(model, datamodule=datamodule)
            fitted = time.perf_counter()
            epochs = engine.trainer.current_epoch
            metrics = engine.test(model, datamodule=datamodule)[0]
            tested = time.perf_counter()
        return Result(
            accelerator=self.spec.accelerator,
            config=self.spec.config,
            metrics={name: value if math.isfinite(value) else None for name, value in metrics.items()},
            seconds={"fit": fitted - start, "test": tested - fitted},
            peak_memory={"host": peak.host, "device": peak.device},
            images={"train": len(datamodule.train_data), "test": len(datamodule.test_data)},
            epochs=epochs,
            threshold_from=_threshold_side(model, datamodule),
            weights=weights_of(model),
            versions=versions(),
            machine=machine(self.accelerator),
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            cases=keeper.draw(self.folder.cases(self.spec.key), self.folder.root),
        )

    @staticmethod
    def collect(results: list[dict[str, Any]]) -> pd.DataFrame:
        """Gather results, which may be none, or of models with different arguments."""
        return pd.DataFrame(results)

    @staticmethod
    def save(result: pd.DataFrame) -> None:
        """Save nothing: each job has saved its own result."""


class _LastValidation(Callback):
    """Validates after the last epoch only, where the number of epochs is known.

    Validation is there for the thresholds. Its figures, of the test side by default, choose nothing here, and its time
    should not count as training.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del pl_module
        stops_sooner = any(isinstance(callback, EarlyStopping | Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and not stops_sooner and trainer.max_steps == -1:
            trainer.check_val_every_n_epoch = trainer.max_epochs


def _threshold_side(model: AnomalibModule, datamodule: AnomalibDataModule) -> str:
    if model.post_processor is None:
        return "none"
    return _THRESHOLD_SIDES[ValSplitMode(datamodule.val_split_mode)]
