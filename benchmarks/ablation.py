"""Finds out which choices move CFA's accuracy, without a look at the test side.

Each variant is fitted through anomalib's engine to four fifths of the normal training images, and judged on the last
fifth with synthetic defects. Each finished run is a line of ``ablation.jsonl``; a rerun goes on with what is missing.

    python benchmarks/ablation.py --weights-path FILE --data magnetic_tile=FOLDER --group layers --seeds 3
"""

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ablation_run import carry_out
from ablation_table import markdown
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from synthetic_defects import KINDS
from variants import GROUPS, Variant

from anomalib_cfa.demo.render import CATEGORIES

Key = dict[str, Any]


def main() -> int:
    """Make the runs that are missing, and the table of all."""
    arguments = parse_arguments()
    logging.getLogger("anomalib").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = arguments.output / "ablation.jsonl"
    done = {json.dumps(run["key"]): run for run in read(results)}
    wanted = {json.dumps(key): (key, variant) for key, variant in plan(arguments)}
    missing = [item for text, item in wanted.items() if text not in done]
    began = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(wanted), completed=len(wanted) - len(missing))
        for key, variant in missing:
            if arguments.minutes is not None and time.monotonic() - began > 60 * arguments.minutes:
                print("Time is up; start it again for the rest.", file=sys.stderr)
                return 3
            progress.update(bar, description=f"{key['data']}, seed {key['seed']}: {variant.name}")
            run = {"key": key, **carry_out(key, variant, arguments)}
            with results.open("a") as file:
                file.write(json.dumps(run) + "\n")
            done[json.dumps(key)] = run
            progress.advance(bar)
    text = markdown([done[name] for name in wanted])
    (arguments.output / "ablation.md").write_text(text)
    print(text)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights-path", type=Path, help="weights of ResNet-18; random without")
    parser.add_argument(
        "--data",
        action="append",
        metavar="NAME[=FOLDER]",
        help=f"a folder in MVTec AD's layout, or a rendered category: {', '.join(CATEGORIES)}; default: the rendered",
    )
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="default: all")
    parser.add_argument("--seeds", type=int, default=2, help="each with another fifth held out; default: %(default)s")
    parser.add_argument("--size", type=int, default=128, help="of the images; default: %(default)s")
    parser.add_argument("--images", type=int, default=250, help="normal images of each set; default: %(default)s")
    parser.add_argument("--report-test", action="store_true", help="judge on the test side, too: only to report")
    parser.add_argument("--minutes", type=float, help="start no further run after this time")
    parser.add_argument("--output", type=Path, default=Path("results/ablation"), help="default: %(default)s")
    arguments = parser.parse_args()
    arguments.data = dict(item.partition("=")[::2] for item in arguments.data or CATEGORIES)
    for name, folder in arguments.data.items():
        if not (Path(folder) / "train/good").is_dir() if folder else name not in CATEGORIES:
            parser.error(f"--data must name a folder with train/good, or a rendered category, but is {name}={folder}")
    if arguments.weights_path is not None and not arguments.weights_path.is_file():
        parser.error(f"--weights-path must be a file, but is {arguments.weights_path}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


def read(path: Path) -> list[dict[str, Any]]:
    """Finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plan(arguments: argparse.Namespace) -> Iterator[tuple[Key, Variant]]:
    """Every run that is wanted, and by what it is known: all that decides its result."""
    weights = None if arguments.weights_path is None else arguments.weights_path.name
    for group in arguments.group or GROUPS:
        for seed in range(arguments.seeds):
            for data in arguments.data:
                for variant in GROUPS[group]:
                    settings = {"data": data, "seed": seed, "size": arguments.size, "images": arguments.images}
                    settings |= {"weights": weights, "test": arguments.report_test, "group": group}
                    options = variant.model_options(arguments.size, seed)
                    key = {**settings, "defects": list(KINDS)}
                    key["variant"] = {**asdict(variant), "options": options}
                    yield json.loads(json.dumps(key)), variant


if __name__ == "__main__":
    sys.exit(main())
