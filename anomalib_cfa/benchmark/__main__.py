"""The benchmark's command line."""

import sys
from argparse import ArgumentParser
from pathlib import Path

from anomalib_cfa.benchmark.pipeline import Benchmark
from anomalib_cfa.benchmark.report import write_report

_PROGRAM = "python -m anomalib_cfa.benchmark"
_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status, 1 if a job failed, 2 after a wrong argument, 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _report(arguments[1:]) if arguments[:1] == ["report"] else _run(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    parser = Benchmark.get_parser()
    parser.prog = _PROGRAM
    parser.description = f"Run a benchmark, or resume one; `{_PROGRAM} report DIR` writes its report."
    options = parser.parse_args(arguments)
    benchmark = Benchmark()
    try:
        benchmark.run(options)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the one into the other
        print("\nInterrupted. Finished jobs are saved; run the same command again to resume.", file=sys.stderr)
        return _INTERRUPTED
    return 1 if benchmark.failures else 0


def _report(arguments: list[str]) -> int:
    parser = ArgumentParser(f"{_PROGRAM} report", description="Write the report of a benchmark's run.")
    parser.add_argument("folder", type=Path, help="The run's folder; the report goes there too.")
    report = write_report(parser.parse_args(arguments).folder)
    print(f"Report: {report}")
    for page in sorted((report.parent / "inspections").glob("*.html")):
        print(f"Inspection page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
