"""Carries tasks out, each in a process of its own, and shows how far it is."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness.store import Result, Store, Task

_PROCESS = Path(__file__).with_name("process.py")


def carry_out(
    question: str,
    tasks: Sequence[Task],
    store: Store,
    places: Mapping[str, object],
    *,
    threads: int = 2,
    minutes: float | None = None,
) -> int:
    """Carry out the tasks that are not finished.

    Args:
        question: The benchmark's file, without ``.py``; its function ``measure`` measures a task.
        tasks: All tasks. ``task["label"]`` is what the progress shows; where ``task["side"]`` is ``"anomalib"``, the
            ``Cfa`` of the process is anomalib's own.
        store: Where results go.
        places: What a task is measured with, but its result does not depend on: paths, for one. They join the task.
        threads: Of each process.
        minutes: Start no further task after this time. None: go on to the end.

    Returns:
        How many tasks are not finished, as they failed or the time was up. Failures are told, and tried again by a
        rerun.
    """
    began, unfinished = time.monotonic(), 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(tasks))
        for task in tasks:
            progress.update(bar, description=task["label"])
            if task not in store:
                if minutes is not None and time.monotonic() - began > 60 * minutes:
                    unfinished += 1
                    continue
                try:
                    store.put(task, _in_process(question, {**task, **places, "threads": threads}))
                except RuntimeError as error:
                    unfinished += 1
                    progress.console.print(f"{task['label']} failed: {error}")
            progress.advance(bar)
    return unfinished


def _in_process(question: str, task: Task) -> Result:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        task_file, result_file = Path(work, "task.json"), Path(work, "result.json")
        task_file.write_text(json.dumps(task | {"work": work}, default=str))
        finished = subprocess.run(
            [sys.executable, "-W", "ignore", _PROCESS, question, task_file, result_file],
            env={
                **os.environ,
                "ANOMALIB_CFA_REGISTER": "0" if task.get("side") == "anomalib" else "1",
                "OMP_NUM_THREADS": str(task["threads"]),
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode or not result_file.exists():
            last = finished.stderr.strip().splitlines()[-1:] or ["no message"]
            msg = f"exit status {finished.returncode}: {last[0]}"
            raise RuntimeError(msg)
        result: Result = json.loads(result_file.read_text())
        return result
