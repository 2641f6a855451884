"""The options that the benchmarks share."""

import argparse
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from harness.store import Task


def base_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--threads", type=int, default=2, help="threads per process; default: %(default)s")
    parser.add_argument("--minutes", type=float, help="start nothing further after this time")
    parser.add_argument("--output", type=Path, default=Path("results"), help="default: %(default)s")
    return parser


def parser_for_sets(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of a benchmark over sets of images."""
    parser = base_parser(description)
    parser.add_argument("--data", type=folder_of_a_set, action=Sets, required=True, help="repeatable")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--test-step", type=int, default=1, help="test only every n-th image, for a quick look")
    return parser


def parser_for_a_backbone(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of a benchmark of one backbone over sets of images."""
    parser = parser_for_sets(description)
    parser.add_argument("--weights-path", type=file, required=True, help="backbone weights, with timm's keys")
    parser.add_argument("--backbone", default="resnet18", help="default: %(default)s")
    return parser


def folder_of_a_set(text: str) -> Path:
    """A set's folder."""
    path = Path(text).resolve()
    for part in ("train/good", "test/good"):
        if not (path / part).is_dir():
            msg = f"must be a set in MVTec AD's layout, but {path} has no {part}"
            raise argparse.ArgumentTypeError(msg)
    return path


def file(text: str) -> Path:
    """An existing file."""
    path = Path(text)
    if not path.is_file():
        msg = f"must be a file, but there is none at {path}"
        raise argparse.ArgumentTypeError(msg)
    return path


def conditions(options: argparse.Namespace, task: Task) -> Task:
    """What else tells a task from others: threads, device, and the content of the files of weights that it reads."""
    given = vars(options)
    files = [given.get("weights_path"), given.get("ckpt_path")]
    if isinstance(of_backbones := given.get("backbone"), dict):
        files.append(of_backbones.get(task.get("backbone")))
    read = "-".join(_digest(path) for path in files if path is not None)
    return {"threads": options.threads, "device": given.get("device", "cpu"), "read": read}


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def places(options: argparse.Namespace) -> dict[str, Any]:
    """Where the files and folders of the options are. Results do not depend on that, so it is not part of a task."""
    given = vars(options)
    found: dict[str, Any] = {
        name: str(given[name].resolve()) for name in ("weights_path", "ckpt_path") if name in given
    }
    if isinstance(data := given.get("data"), list):
        found["root"] = {path.name: str(path.resolve()) for path in data}
    elif data is not None:
        found["root"] = str(data.resolve())
    if isinstance(files := given.get("backbone"), dict):
        found["files"] = {name: str(path.resolve()) for name, path in files.items()}
    return found


class Sets(argparse.Action):
    """A set's folder, repeatable: results are told apart by the folders' names."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:  # noqa: ARG002
        """Take in one."""
        found = getattr(namespace, self.dest) or []
        if any(path.name == values.name for path in found):
            parser.error(f"--data must be folders of different names, but two are called {values.name!r}")
        setattr(namespace, self.dest, [*found, values])


class Backbones(argparse.Action):
    """``NAME=FILE``, repeatable: backbones, and local files of their weights."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:  # noqa: ARG002
        """Take in one."""
        name, separator, path = values.partition("=")
        if not separator or not Path(path).is_file():
            parser.error(f"--backbone must be NAME=FILE, but is {values}")
        found = getattr(namespace, self.dest) or {}
        setattr(namespace, self.dest, {**found, name: Path(path)})
