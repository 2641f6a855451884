"""Takes time and memory."""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback


class Stopwatch(Callback):
    """Notes how long a fit takes until its first step, and how long each step of a full batch takes.

    A step lasts from the end of the one before to its own: reading the images is part of it.

    Args:
        batch_size: Smaller batches, the last ones of an epoch, do not count.
        untrained: File for the model's state when training starts, or None.
    """

    def __init__(self, batch_size: int, untrained: str | None) -> None:
        self.batch_size = batch_size
        self.untrained = untrained
        self.preparation = 0.0
        self.steps: list[float] = []
        self.images = 0
        self._last = self._began = 0.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401, ARG002
        """Begin."""
        self._began = time.perf_counter()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """The memory bank is built."""
        if trainer.current_epoch == 0:
            self.preparation = time.perf_counter() - self._began
            if self.untrained:
                torch.save(pl_module.state_dict(), self.untrained)
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """A step is done."""
        now = time.perf_counter()
        if len(batch) == self.batch_size:
            self.steps.append(now - self._last)
        self.images += len(batch)
        self._last = now


def alternate(calls: list[Callable[[], object]], repeats: int, warm_up: int) -> list[list[float]]:
    """Seconds of each call, made in turn."""
    for _ in range(warm_up):
        for call in calls:
            call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
    return seconds


def peak_memory() -> int:
    """Most bytes that were resident in this process. Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10
