"""Runs tasks, each in its own process, and shows the progress."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness.arguments import conditions, places
from harness.store import Result, Store, Task

_PROCESS = Path(__file__).with_name("process.py")


def answer(question: str, arguments: Sequence[str] | None = None) -> int:
    """Run the missing tasks of a benchmark, and report on all of them.

    Args:
        question: The benchmark's file, without ``.py``. It has four functions: ``parser``, ``plan``, which lists tasks,
            ``measure``, which measures one, and ``report``.
        arguments: The command line's; None for ``sys.argv``'s.

    Returns:
        The exit status: 1 if a run is still missing.
    """
    benchmark = importlib.import_module(question)
    options = benchmark.parser().parse_args(arguments)
    runs, complete = carry_out(question, benchmark.plan(options), options)
    benchmark.report(runs, options)
    return int(not complete)


def carry_out(
    question: str, tasks: Iterable[Task], options: argparse.Namespace
) -> tuple[list[tuple[Task, Result]], bool]:
    """Carry out the tasks that are not finished. Failures are reported; a rerun tries them again.

    Args:
        question: The benchmark's file, without ``.py``; its function ``measure`` measures a task. Results are kept in
            ``QUESTION.jsonl`` in the output folder.
        tasks: All tasks. ``task["label"]`` is what the progress shows; where ``task["side"]`` is ``"anomalib"``, the
            ``Cfa`` of the process is anomalib's own. The :func:`~harness.arguments.conditions` become part of them. The
            :func:`~harness.arguments.places` join them for the measurement, but do not tell one from another.
        options: Those of :func:`~harness.arguments.base_parser`, among others.

    Returns:
        The finished tasks and their results, and whether these are all.
    """
    tasks = [{**conditions(options, task), **task} for task in tasks]
    store, known = Store(options.output / f"{question}.jsonl"), places(options)
    began, minutes = time.monotonic(), options.minutes
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(tasks))
        for task in tasks:
            progress.update(bar, description=task["label"])
            if task not in store:
                if minutes is not None and time.monotonic() - began > 60 * minutes:
                    continue
                try:
                    store.put(task, _in_process(question, {**known, **task}))
                except RuntimeError as error:
                    progress.console.print(f"{task['label']} failed: {error}")
            progress.advance(bar)
    finished = store.finished(tasks)
    return finished, len(finished) == len(tasks)


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
