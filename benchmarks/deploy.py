"""Compares a trained model in PyTorch with its exports: agreement, accuracy, size and speed.

``python benchmarks/deploy.py --ckpt_path MODEL.ckpt --data FOLDER`` predicts every test image of the folder, laid out
as MVTec AD lays out a category, with each runtime and precision; ``--quick`` takes every twentieth. Then it times this
package's ``Cfa`` against anomalib's own, exported in the same way. Each measurement has a process of its own. Figures
go to ``deploy.json`` as they come, and at the end, or when interrupted, to ``deploy.md``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy_report import markdown
from plan import SAME_LAYERS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Row = dict[str, Any]
MEASURE = Path(__file__).with_name("deploy_measure.py")
# Row, export, OpenVINO's compression, and its inference precision; None leaves that to OpenVINO.
WAYS = (
    ("ONNX Runtime", "onnx", None, None),
    ("OpenVINO, float32", "openvino", None, "f32"),
    ("OpenVINO, the CPU's default", "openvino", None, None),
    ("OpenVINO, FP16 weights", "openvino", "fp16", None),
    ("OpenVINO, INT8 weights", "openvino", "int8", None),
    ("OpenVINO, INT8_PTQ", "openvino", "int8_ptq", None),
    ("OpenVINO, INT8_ACQ", "openvino", "int8_acq", None),
)
AGAINST_ANOMALIB = (("resnet18", 256), ("wide_resnet50_2", 224))


def main() -> int:
    """Run the benchmark; the exit status is 1 if a measurement failed, 130 if it was interrupted."""
    arguments = parse_arguments()
    content: dict[str, Any] = {"settings": {name: str(value) for name, value in vars(arguments).items()}, "rows": []}
    status = 130
    try:
        with tempfile.TemporaryDirectory(prefix="deploy-") as work:
            run_all(Benchmark(Path(work), arguments), content, arguments.output / "deploy.json")
        status = int(any("error" in row for row in content["rows"]))
    except KeyboardInterrupt:
        print("Interrupted: what was measured so far is kept.", file=sys.stderr)
    text = markdown(content)
    (arguments.output / "deploy.md").write_text(text)
    print(text)
    print("Written:", arguments.output / "deploy.json", arguments.output / "deploy.md", sep="\n  ")
    return status


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", "--ckpt-path", type=Path, required=True, help="a trained model")
    parser.add_argument("--data", type=Path, required=True, help="with train/good, test/... and ground_truth/...")
    parser.add_argument("--quick", action="store_true", help="few images, fewer kinds, short timings")
    parser.add_argument("--output", type=Path, default=Path("results/deploy"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of each process; default: %(default)s")
    arguments = parser.parse_args()
    if not arguments.ckpt_path.is_file():
        parser.error(f"--ckpt_path must be a checkpoint, but {arguments.ckpt_path} is no file")
    for folder in ("train/good", "test/good", "ground_truth"):
        if not (arguments.data / folder).is_dir():
            parser.error(f"--data must hold {folder}, but {arguments.data} does not")
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


class Benchmark:
    """Makes the measurements, each in a process of its own.

    Args:
        work: Folder for what they leave to each other.
        arguments: The command line's.
    """

    def __init__(self, work: Path, arguments: argparse.Namespace) -> None:
        self.work = work
        self.quick = arguments.quick
        self.shared: dict[str, Any] = {
            "ckpt_path": str(arguments.ckpt_path.resolve()),
            "data": str(arguments.data.resolve()),
            "threads": arguments.threads,
            "reference": str(work / "reference.pt"),
            "every": 20 if arguments.quick else 1,
            "repeats": 5 if arguments.quick else 40,
        }

    def measurements(self) -> Iterator[tuple[str, Any]]:
        """What there is to measure: a label, and a function that measures it."""
        yield "PyTorch", self.pytorch
        for way in WAYS[:5] if self.quick else WAYS:
            yield way[0], lambda way=way: self.exported(*way[1:])
        for backbone, size in AGAINST_ANOMALIB[:1] if self.quick else AGAINST_ANOMALIB:
            for gamma_c in (4, 1):
                for precision in ("f32", None):
                    label = f"{backbone}, {size} x {size}, gamma_c = {gamma_c}, {precision or 'default'}"
                    yield label, lambda way=(backbone, size, gamma_c, precision): self.against_anomalib(*way)

    def pytorch(self) -> Row:
        """The model as it was tested, and the backbone's file that all others are timed beside."""
        self.backbone = self._run("export", format="backbone", root=str(self.work / "backbone"))
        return {"part": "exports", **self._run("reference"), **self._run("time_torch")}

    def exported(self, form: str, compression: str | None, precision: str | None) -> Row:
        """One way to export and to run it."""
        root = str(self.work / f"{form}-{compression}")
        exported = self._run("export", format=form, compression=compression, root=root)
        of_file = {"path": exported["path"], "precision": precision}
        # The backbone's own file is not compressed: no share of it can be told from that of INT8. All others compute it
        # in float32. It runs in the same runtime: two of them would wait for each other's threads.
        backbone = Path(self.backbone["path"]).with_suffix(".onnx" if form == "onnx" else ".xml")
        beside = {} if compression and compression.startswith("int8") else {"beside": [str(backbone), "f32"]}
        times = self._run("time_files", size=exported["size"], **of_file, **beside)
        if beside:
            times["backbone_ms"] = times.pop("beside_ms")
        return {"part": "exports", "bytes": exported["bytes"], **times, **self._run("agreement", **of_file)}

    def against_anomalib(self, backbone: str, size: int, gamma_c: int, precision: str | None) -> Row:
        """Both sides with random weights, a random memory bank and the same layers, timed in turn."""
        task = {"backbone": backbone, "size": size, "gamma_c": gamma_c, "options": SAME_LAYERS}
        files = {}
        for side in ("ours", "anomalib"):
            root = self.work / f"{side}-{backbone}-{gamma_c}"
            path = root / "weights/openvino/model.xml"
            if not path.exists():
                self._run("export_random", side, root=str(root), **task)
            files[side] = str(path)
        pair = {"path": files["ours"], "beside": [files["anomalib"], precision], "precision": precision}
        times = self._run("time_files", size=[size, size], **pair)
        return {"part": "anomalib", "ours_ms": times["whole_ms"], "anomalib_ms": times["beside_ms"]}

    def _run(self, kind: str, side: str = "ours", **settings: Any) -> Row:  # noqa: ANN401
        task_file, result_file = self.work / "task.json", self.work / "result.json"
        task_file.write_text(json.dumps({**self.shared, "kind": kind, "side": side, **settings}))
        result_file.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "ANOMALIB_CFA_REGISTER": "0" if side == "anomalib" else "1",
            "OMP_NUM_THREADS": str(self.shared["threads"]),
        }
        command = [sys.executable, "-W", "ignore", str(MEASURE), str(task_file), str(result_file)]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=self.work)
        if finished.returncode or not result_file.exists():
            raise RuntimeError(finished.stderr.strip()[-2000:] or f"exit status {finished.returncode}")
        result: Row = json.loads(result_file.read_text())
        return result


def run_all(benchmark: Benchmark, content: dict[str, Any], path: Path) -> None:
    """Make the measurements, one after the other, show how far they are, and keep what there is."""
    from anomalib_cfa.benchmark.provenance import machine, versions  # noqa: PLC0415 - slow

    content["environment"] = {"machine": machine("cpu"), "versions": versions()}
    measurements = list(benchmark.measurements())
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(measurements))
        for label, measure in measurements:
            progress.update(bar, description=label)
            try:
                row = measure()
            except RuntimeError as error:
                row = {"part": "exports", "error": str(error)}
                progress.console.print(f"{label} failed: {str(error).splitlines()[-1]}")
            content["rows"].append({"label": label, **row})
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(content, indent=1))
            partial.replace(path)
            progress.advance(bar)


if __name__ == "__main__":
    sys.exit(main())
