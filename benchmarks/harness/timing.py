"""Time and memory of this process."""

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch


def alternate(calls: Sequence[Callable[[], object]], repeats: int, warm_up: int = 3) -> list[float]:
    """Median seconds of each call, made in turn, so that a machine's moods meet all of them."""
    taken: list[list[float]] = [[] for _ in calls]
    for number in range(repeats + warm_up):
        for call, seconds in zip(calls, taken, strict=True):
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warm_up:
                seconds.append(time.perf_counter() - began)
    return [median(seconds) for seconds in taken]


def peak_memory() -> int:
    """Most bytes that were resident in this process. Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10


def limit_threads(threads: int) -> None:
    """Hold this process to so many threads, whichever library starts them."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
