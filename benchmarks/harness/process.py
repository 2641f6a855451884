"""The process that measures one task: ``python process.py QUESTION TASK RESULT``. The runner starts it."""

import importlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    question, task_file, result_file = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parents[1]))
    task = json.loads(Path(task_file).read_text())

    import torch
    from anomalib.models import Cfa

    torch.set_num_threads(task["threads"])
    if Cfa.__module__.startswith("anomalib_cfa") != (task.get("side") != "anomalib"):
        sys.exit(f"{Cfa.__module__}.Cfa is not the one of {task.get('side', 'this package')}")
    result = importlib.import_module(question).measure(task)

    from anomalib_cfa.benchmark.provenance import machine, versions

    environment = {"machine": machine(task.get("device", "cpu")), "versions": versions()}
    Path(result_file).write_text(json.dumps(result | {"environment": environment}))
