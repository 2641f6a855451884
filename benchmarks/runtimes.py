"""Runs exported models, each runtime behind the same call."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Outputs = dict[str, NDArray[Any]]
Predict = Callable[[NDArray[np.float32]], Outputs]


def load(path: Path, precision: str | None, threads: int) -> Predict:
    """A function that maps a batch of images to a model's outputs.

    Args:
        path: An ``.onnx`` file for ONNX Runtime, or an ``.xml`` file for OpenVINO on the CPU.
        precision: OpenVINO's inference precision; None leaves the choice to it.
        threads: How many threads it may use.
    """
    if path.suffix == ".onnx":
        import onnxruntime  # noqa: PLC0415 - optional

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options)
        name = session.get_inputs()[0].name
        names = [output.name for output in session.get_outputs()]
        return lambda image: dict(zip(names, session.run(None, {name: image}), strict=True))

    import openvino  # noqa: PLC0415 - optional

    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    config |= {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
    return lambda image: {output.any_name: value for output, value in request.infer([image]).items()}


def latency(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each call, made in turn after a warm-up."""
    taken: list[list[float]] = [[] for _ in calls]
    for number in range(repeats + 3):
        for call, seconds in zip(calls, taken, strict=True):
            began = time.perf_counter()
            call()
            if number >= 3:
                seconds.append(time.perf_counter() - began)
    return [1e3 * median(seconds) for seconds in taken]


def size_on_disk(path: Path) -> int:
    """Bytes of a model's files."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))


def limit_threads(threads: int) -> None:
    """Hold this process to so many threads, whichever library starts them."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
