"""A job's specification, in plain values, which can be named, saved and sent before anything is built."""

import hashlib
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from anomalib.pipelines.components.utils import get_iterator_from_grid_dict

_SECTIONS = ("seed", "model", "data")


@dataclass(frozen=True)
class JobSpec:
    """One point of a benchmark's grid."""

    accelerator: str  # ``"cpu"`` or ``"cuda"``
    # The file's ``benchmark`` with one value for each grid: ``seed``, ``model``, ``data``, perhaps ``trainer``.
    config: dict[str, Any]

    @property
    def model(self) -> dict[str, Any]:
        """The model's ``class_path`` and ``init_args``."""
        return _class_and_arguments(self.config["model"])

    @property
    def data(self) -> dict[str, Any]:
        """The data module's ``class_path`` and ``init_args``."""
        return _class_and_arguments(self.config["data"])

    @property
    def model_name(self) -> str:
        """The model's class, without its module."""
        return str(self.model["class_path"]).rpartition(".")[2]

    @property
    def data_name(self) -> str:
        """The data module's class, without its module."""
        return str(self.data["class_path"]).rpartition(".")[2]

    @property
    def category(self) -> str:
        """The category; the ``name`` or else the class of a data module without categories."""
        arguments = self.data["init_args"]
        return str(arguments.get("category") or arguments.get("name") or self.data_name)

    @property
    def seed(self) -> int:
        """The model's own seed if the file sets one, or else the run's."""
        return int(self.model["init_args"].get("seed", self.config["seed"]))

    @property
    def key(self) -> str:
        """Name of the job's files: the category, the seed, and a hash of all its settings."""
        settings = json.dumps({"accelerator": self.accelerator, **self.config}, sort_keys=True, default=str)
        category = re.sub(r"[^\w.-]", "_", self.category)
        return f"{category}-seed{self.seed}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def _class_and_arguments(section: str | dict[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {"class_path": section} if isinstance(section, str) else section
    return {"class_path": named["class_path"], "init_args": dict(named.get("init_args") or {})}


def check_config(config: object) -> None:
    """Check the parts of a benchmark's file that all jobs share.

    Raises:
        ValueError: If a section is missing.
    """
    benchmark = config.get("benchmark") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(benchmark, dict) or "accelerator" not in config:
        msg = "config must have the sections 'accelerator' and 'benchmark', as for `anomalib benchmark`"
        raise ValueError(msg)
    if missing := [name for name in _SECTIONS if name not in benchmark]:
        msg = f"benchmark in the config must have {', '.join(_SECTIONS)}, but lacks {', '.join(missing)}"
        raise ValueError(msg)


def accelerators(config: dict[str, Any]) -> list[str]:
    """The accelerators of a benchmark's file, which may name one or several."""
    named = config["accelerator"]
    return list(named) if isinstance(named, list) else [named]


def expand(accelerator: str, section: dict[str, Any]) -> Iterator[JobSpec]:
    """All different points of the grid of a file's ``benchmark`` section."""
    seen = set()
    for config in get_iterator_from_grid_dict(section):
        spec = JobSpec(accelerator, deepcopy(config))  # anomalib's dicts share their parts
        if spec.key not in seen:
            seen.add(spec.key)
            yield spec
