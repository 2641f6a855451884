"""What one must know to judge a figure: versions, machine, weights, and the memory it took."""

import hashlib
import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType

import torch
from anomalib.models.components import AnomalibModule

from anomalib_cfa.lightning_model import Cfa

_PACKAGES = ("anomalib-cfa", "anomalib", "torch", "torchvision", "lightning", "timm", "faiss-cpu")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def machine(accelerator: str) -> dict[str, str]:
    """What the job runs on. The machine's name is nobody's business."""
    described = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
    }
    with suppress(ValueError, OSError, AttributeError):  # not every system tells
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        described["memory"] = f"{memory / 2**30:.0f} GiB"
    if accelerator == "cuda":
        described["accelerator"] = torch.cuda.get_device_name()
    return described


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def weights_of(model: AnomalibModule) -> str:
    """The weights of a model's backbone: timm's name and tag, and the file if they come from one."""
    if not isinstance(model, Cfa):
        return f"{model.hparams.get('backbone', 'unknown')}, as {model.name} takes them"
    features = model.model.patch_features
    if not features.pre_trained:
        return f"{features.weights_tag}, untrained"
    if features.weights_path is None:
        return features.weights_tag
    path = Path(features.weights_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{features.weights_tag}, from {path.name} (SHA-256 {digest[:12]}…)"


class PeakMemory:
    """Measures the most memory that is held at once within a ``with`` block.

    Attributes:
        host: Bytes resident in this process, without data loaders' workers; where the system cannot start the count
            anew, since the process began; None where it does not tell at all.
        device: Bytes allocated on the GPU by torch; None without one.

    Args:
        accelerator: ``"cpu"`` or ``"cuda"``.
        index: Of the GPU.
    """

    def __init__(self, accelerator: str, index: int = 0) -> None:
        self.host: int | None = None
        self.device: int | None = None
        self._index = index if accelerator == "cuda" else None

    def __enter__(self) -> "PeakMemory":  # noqa: PYI034 - Self is of Python 3.11
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
        if self._index is not None:
            torch.cuda.reset_peak_memory_stats(self._index)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.host = _peak_resident()
        if self._index is not None:
            self.device = torch.cuda.max_memory_allocated(self._index)


def _peak_resident() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 2**10
    return None
