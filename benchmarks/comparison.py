"""Sets this package's ``Cfa`` beside anomalib's own, PatchCore and PaDiM: accuracy, time, memory and latency.

All get the same backbone weights and pixels; each model and seed has a process of its own. Finished
ones are lines of ``comparison.jsonl``; a rerun goes on with what is missing, and writes ``comparison.md``.

    python benchmarks/comparison.py --weights-path FILE --data FOLDER [--quick] [--option gamma_c=0.25]
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comparison_table import ACCURACY, markdown
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from anomalib_cfa import Cfa

RUN = Path(__file__).with_name("comparison_run.py")
CFA, ANOMALIB_CFA, PATCHCORE, PADIM = "this Cfa", "anomalib's Cfa", "PatchCore", "PaDiM"
MODELS = (CFA, PADIM, PATCHCORE, ANOMALIB_CFA)
# Of Cfa's, those that all models get alike, or by which the runs differ.
_SHARED_ARGUMENTS = {"backbone", "weights_path", "pre_trained", "image_size", "center_crop_size", "seed"}
_SHARED_ARGUMENTS |= {"pre_processor", "post_processor", "evaluator", "visualizer"}
Task = dict[str, Any]


def main() -> int:
    """Make the runs that are missing, and the table of all; the exit status is 1 if one failed."""
    arguments = parse_arguments()
    results = arguments.output / "comparison.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {json.dumps(run["task"]): run for run in map(json.loads, lines)}
    tasks = list(plan(arguments))
    failed = 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(tasks))
        for task in tasks:
            progress.update(bar, description=f"{task['model']}, seed {task['seed']}")
            if json.dumps(task) not in done:
                result = carry_out(task, arguments)
                if "error" in result:
                    failed += 1
                    progress.console.print(f"{task['model']}, seed {task['seed']} failed: {result['error']}")
                else:
                    done[json.dumps(task)] = {"task": task, "result": result}
                    with results.open("a") as file:
                        file.write(json.dumps(done[json.dumps(task)]) + "\n")
            progress.advance(bar)
    text = markdown([done[json.dumps(task)] for task in tasks if json.dumps(task) in done])
    (arguments.output / "comparison.md").write_text(text)
    print(text)
    return int(failed > 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in MVTec AD's layout, images of any format")
    parser.add_argument("--weights-path", type=Path, required=True, help="weights of ResNet-18")
    parser.add_argument("--quick", action="store_true", help="64 training images of 128 x 128 pixels, a quarter tested")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--size", type=int, default=256, help="of the images; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of each process; default: %(default)s")
    parser.add_argument("--epochs", type=int, help="of this Cfa; default: as the model has it")
    parser.add_argument(
        "--option", action="append", type=option, metavar="NAME=VALUE", help="of this Cfa, the value as JSON has it"
    )
    parser.add_argument("--anomalib-epochs", type=int, default=1, help="of anomalib's Cfa; default: %(default)s")
    parser.add_argument("--coreset", type=float, default=0.01, help="PatchCore's share kept; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("results/comparison"), help="default: %(default)s")
    arguments = parser.parse_args()
    if not (arguments.data / "train/good").is_dir():
        parser.error(f"--data must hold train/good, but {arguments.data} does not")
    if not arguments.weights_path.is_file():
        parser.error(f"--weights-path must be a file, but {arguments.weights_path} is not")
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


def option(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``; a value that is no JSON is text."""
    name, separator, value = text.partition("=")
    if not separator or name not in inspect.signature(Cfa).parameters or name in _SHARED_ARGUMENTS:
        msg = f"must be NAME=VALUE with an argument of Cfa that does not concern all models, but is {text}"
        raise argparse.ArgumentTypeError(msg)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def plan(arguments: argparse.Namespace) -> Iterator[Task]:
    """Every run, by all that decides its result."""
    shared = {
        "data": arguments.data.name,
        "weights": arguments.weights_path.name,
        "size": 128 if arguments.quick else arguments.size,
        "training_images": 64 if arguments.quick else None,
        "test_step": 4 if arguments.quick else 1,
        "threads": arguments.threads,
        "metrics": list(ACCURACY),
    }
    own = {
        CFA: {"epochs": arguments.epochs, "options": dict(sorted(arguments.option or []))},
        ANOMALIB_CFA: {"epochs": arguments.anomalib_epochs, "gamma_c": 1},
        PATCHCORE: {"coreset": arguments.coreset},
        PADIM: {},
    }
    for seed in range(arguments.seeds):
        for model in arguments.model or MODELS:
            yield {"model": model, "seed": seed, **shared, **own[model]}


def carry_out(task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make a run in a process of its own; gives back its result, or why there is none."""
    with tempfile.TemporaryDirectory(prefix="comparison-") as work:
        task_file, result_file = Path(work, "task.json"), Path(work, "result.json")
        places = {"root": arguments.data, "weights_path": arguments.weights_path, "work": work}
        task_file.write_text(json.dumps(task | {name: str(Path(path).resolve()) for name, path in places.items()}))
        finished = subprocess.run(
            [sys.executable, "-W", "ignore", RUN, task_file, result_file],
            env={
                **os.environ,
                "ANOMALIB_CFA_REGISTER": "1" if task["model"] == CFA else "0",
                "OMP_NUM_THREADS": str(task["threads"]),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode or not result_file.exists():
            last = finished.stderr.strip().splitlines()[-1:] or ["no message"]
            return {"error": f"exit status {finished.returncode}: {last[0]}"}
        result: dict[str, Any] = json.loads(result_file.read_text())
        return result


if __name__ == "__main__":
    sys.exit(main())
