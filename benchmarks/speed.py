"""Compares this package's ``Cfa`` with anomalib's own: time and memory of training and inference.

``python benchmarks/speed.py --quick`` takes a few minutes, without ``--quick`` an hour or more. Each measurement has a
process of its own, the two sides take turns, and what is compared are medians of the ratios of neighbouring runs.
Figures go to ``speed.json`` as they come, and at the end, or when interrupted, to ``speed.md`` and pictures.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plots
import report
from plan import ANOMALIB, FULL, PARTS, QUICK, Measurement, Scale
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from summary import distance_matrix_bytes, needed_bytes

Row = dict[str, Any]
MEASURE = Path(__file__).with_name("measure.py")


def main() -> int:
    """Run the benchmark; the exit status is 1 if a measurement failed, 130 if it was interrupted."""
    arguments = parse_arguments()
    scale = QUICK if arguments.quick else FULL
    measurements = [one for part in arguments.only or PARTS for one in PARTS[part](scale)]
    results = Results(arguments.output / "speed.json", arguments.only or list(PARTS), vars(arguments))
    status = 130
    try:
        with tempfile.TemporaryDirectory(prefix="speed-") as work:
            run_all(measurements, Runner(Path(work), scale, arguments), results)
        status = int(any("error" in row["result"] for row in results.rows))
    except KeyboardInterrupt:
        print("Interrupted: what was measured so far is kept.", file=sys.stderr)
    text = report.markdown(results.content)
    (arguments.output / "speed.md").write_text(text)
    pictures = plots.draw(results.content, arguments.output)
    print(text)
    print("Written:", *(str(path) for path in [results.path, arguments.output / "speed.md", *pictures]), sep="\n  ")
    return status


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images and few of them: under 3 minutes")
    parser.add_argument("--only", action="append", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--weights-path", type=Path, help="weights of ResNet-18; random without")
    parser.add_argument("--images", type=Path, help="folder of normal images; rendered without")
    parser.add_argument("--output", type=Path, default=Path("results/speed"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of each process; default: %(default)s")
    arguments = parser.parse_args()
    for name in ("weights_path", "images"):
        path: Path | None = getattr(arguments, name)
        if path is not None and not path.exists():
            parser.error(f"--{name.replace('_', '-')} must be there, but {path} is not")
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


class Results:
    """What was measured, in a file that is complete at any time; parts that are not measured anew stay.

    Args:
        path: The file.
        parts: Those that are measured anew.
        settings: The command line's.
    """

    def __init__(self, path: Path, parts: Sequence[str], settings: dict[str, Any]) -> None:
        self.path = path
        kept = json.loads(path.read_text())["rows"] if path.exists() else []
        self.rows: list[Row] = [row for row in kept if row["part"] not in parts]
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
        self.content: dict[str, Any] = {"settings": plain, "environment": {}, "rows": self.rows}

    def save(self) -> None:
        """Write the file, whole or not at all."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1))
        partial.replace(self.path)


class Runner:
    """Starts the processes.

    Args:
        work: Folder for what they leave to each other.
        scale: How many images there are.
        arguments: The command line's.
    """

    def __init__(self, work: Path, scale: Scale, arguments: argparse.Namespace) -> None:
        self.work = work
        self.threads = arguments.threads
        self.weights = arguments.weights_path and str(arguments.weights_path.resolve())
        self.source = arguments.images and str(arguments.images.resolve())
        self.count = scale.images

    def lay_out_images(self) -> Row:
        """Prepare the images; gives back machine and versions."""
        settings = {"source": self.source, "count": self.count}
        return self._run(Measurement("", "images", "ours", "images", settings), self.work / "images")

    def __call__(self, measurement: Measurement) -> Row:
        """Make a measurement; gives back its results, or why there is none."""
        settings = measurement.settings
        if measurement.side == ANOMALIB and measurement.part == "growth":
            batch_size, size = settings.get("batch_size", 1), settings["size"]
            if (needed := needed_bytes(batch_size, size)) > available_memory():
                alone = distance_matrix_bytes(batch_size, size) / 2**30
                return {"not_run": f"its distance matrix alone takes {alone:.0f} GiB", "expected_bytes": needed}
        return self._run(measurement, self._some_images(settings.get("image_count", self.count)))

    def _some_images(self, count: int) -> Path:
        every = sorted((self.work / "images").iterdir())
        folder = self.work / f"images-{count}"
        if not folder.exists():
            folder.mkdir()
            for number in range(count):
                image = every[number * len(every) // count]
                os.link(image, folder / f"{number:04}{image.suffix}")
        return folder

    def _run(self, measurement: Measurement, images: Path) -> Row:
        task = {**measurement.settings, "side": measurement.side, "kind": measurement.kind, "images": str(images)}
        task |= {"round": measurement.round, "threads": self.threads, "work": str(self.work / "runs")}
        if task.get("backbone") == "resnet18":
            task["weights_path"] = self.weights
        for name in ("state", "untrained"):
            if name in task:
                task[name] = str(self.work / f"{task[name]}.pt")
        task_file, result_file = self.work / "task.json", self.work / "result.json"
        task_file.write_text(json.dumps(task))
        result_file.unlink(missing_ok=True)
        finished = subprocess.run(
            [sys.executable, "-W", "ignore", MEASURE, task_file, result_file],
            env={
                **os.environ,
                "ANOMALIB_CFA_REGISTER": "0" if measurement.side == ANOMALIB else "1",
                "OMP_NUM_THREADS": str(self.threads),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode or not result_file.exists():
            last = finished.stderr.strip().splitlines()[-1:] or ["no message"]
            return {"error": f"exit status {finished.returncode}: {last[0]}", "log": finished.stderr[-4000:]}
        result: Row = json.loads(result_file.read_text())
        return result


def run_all(measurements: Sequence[Measurement], run: Runner, results: Results) -> None:
    """Make the measurements, one after the other, and show how far they are."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("laying out images", total=len(measurements))
        laid_out = run.lay_out_images()
        if "error" in laid_out:
            sys.exit(f"No images: {laid_out['error']}\n{laid_out['log']}")
        results.content["environment"] = laid_out
        for one in measurements:
            progress.update(bar, description=f"{one.part}: {one.label} ({one.side})")
            result = run(one)
            if "error" in result:
                progress.console.print(f"{one.part}: {one.label} ({one.side}) failed: {result['error']}")
            row = {"part": one.part, "label": one.label, "side": one.side, "round": one.round}
            results.rows.append({**row, "kind": one.kind, "settings": one.settings, "result": result})
            results.save()
            progress.advance(bar)


def available_memory() -> float:
    """Bytes that a process can still get; unlimited where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable"))


if __name__ == "__main__":
    sys.exit(main())
