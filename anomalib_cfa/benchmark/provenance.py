"""The conditions of a measurement: versions, machine, weights, and peak memory."""

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

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
    """Processor, memory and accelerator of this machine, without its name."""
    described = {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
    }
    with suppress(ValueError, OSError, AttributeError):  # not on every system
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        described["memory"] = f"{memory / 2**30:.0f} GiB"
    if accelerator == "cuda":
        described["accelerator"] = torch.cuda.get_device_name()
    return described


def weights_of(model: AnomalibModule) -> str:
    """The weights of a model's backbone: timm's name and tag, and the file if they come from one."""
    if not isinstance(model, Cfa):
        return f"{model.hparams.get('backbone', 'unknown')}, weights as chosen by {model.name}"
    features = model.model.patch_features
    if not features.pre_trained:
        return f"{features.weights_tag}, untrained"
    if features.weights_path is None:
        return features.weights_tag
    path = Path(features.weights_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{features.weights_tag}, from {path.name} (SHA-256 {digest[:12]}…)"


@contextmanager
def peak_memory(accelerator: str, index: int = 0) -> Iterator[dict[str, int | None]]:
    """Measure the peak memory within a ``with`` block, on a GPU too where the accelerator is ``"cuda"``.

    Yields:
        A dictionary that is filled when the block ends. ``host``: bytes resident in this process, without data loaders'
        workers; since the process began where the system cannot reset the count; None where it has none. ``device``:
        bytes that torch has allocated on the GPU; None without one.
    """
    peak: dict[str, int | None] = {"host": None, "device": None}
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    if accelerator == "cuda":
        torch.cuda.init()  # until then, torch knows no device whose count to reset
        torch.cuda.reset_peak_memory_stats(index)
    try:
        yield peak
    finally:
        if (resident := _field("/proc/self/status", "VmHWM")) is not None:  # "… kB"
            peak["host"] = int(resident.split()[0]) * 2**10
        if accelerator == "cuda":
            peak["device"] = torch.cuda.max_memory_allocated(index)


def _field(file: str, name: str) -> str | None:
    """What a file of Linux's ``/proc`` says of a name."""
    with suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return None
