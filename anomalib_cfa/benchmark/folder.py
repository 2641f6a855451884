"""A run's folder: the results and failures of its jobs, each file written whole or not at all."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anomalib_cfa.benchmark.spec import JobSpec


@dataclass(frozen=True)
class Case:
    """The defective or normal image that the model did best or worst on."""

    kind: str  # ``"best"`` or ``"worst"``
    image: str  # the image's folder and name
    is_defective: bool  # the ground truth label
    score: float  # the image's score, before normalization
    threshold: float  # images with a score above it are called defective
    margin: float  # how far the score lies on the right side of the threshold; negative: on the wrong side
    picture: str  # path of the picture, in the run's folder


@dataclass(frozen=True)
class Outcome:
    """What became of a job, whose ``accelerator`` and ``config`` are those of :class:`JobSpec`."""

    accelerator: str
    config: dict[str, Any]

    @property
    def spec(self) -> JobSpec:
        """The job."""
        return JobSpec(self.accelerator, self.config)


@dataclass(frozen=True)
class Result(Outcome):
    """What a finished job measured, and under which conditions."""

    metrics: dict[str, float | None]  # test metrics by anomalib's names; None in place of nan
    seconds: dict[str, float]  # wall time of ``fit``, with the memory bank and a last validation, and of ``test``
    peak_memory: dict[str, int | None]  # bytes: ``host``, resident in the process, None where it is unknown; ``device``
    images: dict[str, int]  # numbers of ``train`` and ``test`` images
    epochs: int  # number of epochs trained
    threshold_from: str  # the split whose labels chose the thresholds: ``"test"``, ``"validation"`` or ``"none"``
    weights: str  # the backbone's weights
    versions: dict[str, str]  # of Python and the packages
    machine: dict[str, str]  # the machine it ran on
    finished: str  # time, in ISO format
    cases: list[Case]  # the best and worst cases


@dataclass(frozen=True)
class Failure(Outcome):
    """Why a job failed: its title in a few words, the error in one line, and the error's traceback."""

    title: str
    reason: str
    traceback: str


class RunFolder:
    """Folder of a run: ``results/``, ``failures/`` and ``cases/`` by job, the run's config, and its report.

    It is created when something is written.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.work = self.root / "work"

    def has_result(self, key: str) -> bool:
        """Whether a job is finished."""
        return self._file("results", key).is_file()

    def is_settled(self, key: str) -> bool:
        """Whether a job is finished or has failed."""
        return self.has_result(key) or self._file("failures", key).is_file()

    def inspection(self, key: str) -> Path:
        """A job's page on which to judge its model; there is none where the model or its images do not allow it."""
        return self.root / "inspections" / f"{key}.html"

    def save_result(self, result: Result) -> None:
        """Save a result, all of it or nothing."""
        _write(self._file("results", result.spec.key), asdict(result))
        self.forget_failure(result.spec.key)

    def save_failure(self, failure: Failure) -> None:
        """Save why a job failed."""
        _write(self._file("failures", failure.spec.key), asdict(failure))

    def results(self) -> Iterator[Result]:
        """All results, in the order of their files' names."""
        for values in _read_all(self.root / "results"):
            yield Result(**values | {"cases": [Case(**case) for case in values["cases"]]})

    def failures(self) -> Iterator[Failure]:
        """All failures, in the order of their files' names."""
        for values in _read_all(self.root / "failures"):
            yield Failure(**values)

    def forget_failure(self, key: str) -> None:
        """Let a job that failed be tried again."""
        self._file("failures", key).unlink(missing_ok=True)

    def _file(self, kind: str, key: str) -> Path:
        return self.root / kind / f"{key}.json"


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # If the process is killed, only the draft is left, which is never read.
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")
    draft.replace(path)


def _read_all(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        yield values
