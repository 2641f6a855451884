"""Time and memory of this process."""

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch


def alternate(calls: Sequence[Callable[[], object]], repeats: int, warm_up: int = 3) -> list[float]:
    """Median seconds of each call, interleaved, so that changes in machine load affect all alike."""
    taken: list[list[float]] = [[] for _ in calls]
    for number in range(repeats + warm_up):
        for call, seconds in zip(calls, taken, strict=True):
            began = now()
            call()
            if number >= warm_up:
                seconds.append(now() - began)
    return [median(seconds) for seconds in taken]


def now() -> float:
    """Seconds, once a GPU has done what was asked of it before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str = "cpu") -> int:
    """Most bytes that were resident in this process, or that it held on a GPU. Linux counts in KiB, macOS in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10


def limit_threads(threads: int) -> None:
    """Limit this process to a number of threads, whichever library starts them."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
