"""The demo's steps in processes of their own: anomalib's command line, as a user would type it."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pandas as pd

from anomalib_cfa.demo.weights import Weights

MODEL = "Cfa"
DATA = "MVTecAD"


def shown(path: Path) -> str:
    """A path as it is printed: from the working directory, unless it is on another drive."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def find_config() -> Path:
    """``configs/demo.yaml``: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(path for folder in (package, package.parent) if (path := folder / "configs" / "demo.yaml").is_file())


def train(category: str, datasets: Path, output: Path, weights: Weights, epochs: int | None, seed: int) -> Path:
    """Run ``anomalib train`` on one category of a data set, and return the checkpoint of the last epoch.

    Raises:
        RuntimeError: The command failed.
    """
    arguments = ["--config", str(find_config()), "--model", MODEL, "--model.seed", str(seed)]
    arguments += ["--model.backbone", weights.backbone]
    arguments += ["--model.weights_path", str(weights.path)] if weights.path else ["--model.pre_trained", "false"]
    arguments += ["--data", DATA, "--data.root", str(datasets), "--data.category", category]
    arguments += ["--trainer.logger.save_dir", str(output / "metrics" / category)]
    arguments += ["--trainer.logger.name", "", "--trainer.logger.version", ""]
    if epochs is not None:
        arguments += ["--trainer.max_epochs", str(epochs), "--trainer.check_val_every_n_epoch", str(epochs)]
    arguments += ["--default_root_dir", str(output)]
    _anomalib("train", arguments, output / "logs" / f"train_{category}.log")
    return output / MODEL / DATA / category / "latest" / "weights" / "lightning" / "model.ckpt"


def read_metrics(category: str, output: Path) -> dict[str, float]:
    """The test metrics that :func:`train` logged, by their names in anomalib."""
    logged = pd.read_csv(output / "metrics" / category / "metrics.csv")
    tested = logged.dropna(subset="pixel_AUPRO").iloc[-1].dropna()  # AUPRO is a metric of the test only
    return {name: float(value) for name, value in tested.items() if name.startswith(("image_", "pixel_"))}


def export_openvino(category: str, checkpoint: Path, output: Path) -> Path:
    """Run ``anomalib export`` to OpenVINO, and return the ``.xml`` file.

    Raises:
        RuntimeError: The command failed.
    """
    root = output / "exported" / category
    arguments = ["--model", MODEL, "--ckpt_path", str(checkpoint), "--export_type", "openvino"]
    arguments += ["--export_root", str(root), "--default_root_dir", str(output)]
    _anomalib("export", arguments, output / "logs" / f"export_{category}.log")
    return root / "weights" / "openvino" / "model.xml"


def _anomalib(subcommand: str, arguments: list[str], log: Path) -> None:
    """Print and run a command of anomalib's, with its output in ``log``."""
    executable = shutil.which("anomalib", path=sysconfig.get_path("scripts"))
    if executable is None:
        msg = "The command `anomalib` is not installed in this Python environment: install anomalib."
        raise RuntimeError(msg)
    print(f"\n$ anomalib {subcommand} {shlex.join(arguments)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    # The weights are local files by now, so nothing needs to wait for the hub.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    with log.open("w") as file:
        done = subprocess.run(  # noqa: S603 - the arguments are this module's
            [executable, subcommand, *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        msg = f"`anomalib {subcommand}` failed with exit status {done.returncode}; the end of {log}:\n{tail}"
        raise RuntimeError(msg)
