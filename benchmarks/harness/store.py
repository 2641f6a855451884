"""Results of finished tasks, one line of JSON each: whatever interrupts a run, what was finished is kept."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Task = dict[str, Any]
Result = dict[str, Any]


class Store:
    """A file of results.

    Args:
        path: A ``.jsonl`` file; created with the first result. A truncated last line is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results: dict[str, Result] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._results[_key(record["task"])] = record["result"]

    def __contains__(self, task: Task) -> bool:
        return _key(task) in self._results

    def __getitem__(self, task: Task) -> Result:
        return self._results[_key(task)]

    def put(self, task: Task, result: Result) -> None:
        """Keep a result, on the disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"task": task, "result": result})
        with self.path.open("a") as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write("\n")
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._results[_key(task)] = json.loads(line)["result"]

    def finished(self, tasks: Iterable[Task]) -> list[tuple[Task, Result]]:
        """Those of some tasks that are finished, with their results."""
        return [(task, self[task]) for task in tasks if task in self]


def _key(task: Task) -> str:
    return json.dumps(task, sort_keys=True)
