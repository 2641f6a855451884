"""Anomalib's benchmark pipeline with a run folder: results outlive an interruption, and failures are told."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from anomalib.pipelines import Benchmark as AnomalibBenchmark
from anomalib.pipelines.components.base import Runner
from anomalib.pipelines.components.runners import ParallelRunner as AnomalibParallelRunner
from anomalib.pipelines.components.runners import SerialRunner
from anomalib.pipelines.components.runners.serial import SerialExecutionError
from jsonargparse import ArgumentParser, Namespace

from anomalib_cfa.benchmark.folder import Failure, RunFolder
from anomalib_cfa.benchmark.generator import JobGenerator
from anomalib_cfa.benchmark.runners import ParallelRunner
from anomalib_cfa.benchmark.spec import accelerators, check_config, expand


class Benchmark(AnomalibBenchmark):
    """Anomalib's benchmark, for runs of hours.

    It takes anomalib's file: ``accelerator``, and ``benchmark`` with ``seed``, ``model`` and ``data``, each value of
    which may be a ``grid``. Two things more are understood, which anomalib's own command ignores or refuses: a
    ``trainer`` section in ``benchmark``, with plain arguments of Lightning's trainer such as ``max_epochs``, and a data
    module of another package by its full class path.

    Each job's result is saved when it is finished. A run with the same folder goes on with what is missing, tries what
    failed again, and leaves results of other settings alone.

    Attributes:
        failures: The jobs of the last run that failed.

    Example:
        >>> from jsonargparse import Namespace
        >>> Benchmark().run(Namespace(config="configs/benchmark_mvtec.yaml", output=None))  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self._folder = RunFolder("results/benchmark")

    @staticmethod
    def get_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
        """Anomalib's parser, with an option for the run's folder."""
        parser = AnomalibBenchmark.get_parser(parser)
        parser.add_argument(
            "--output", type=Path | None, help="The run's folder; results/benchmark/<name of the file> by default."
        )
        return parser

    def run(self, args: Namespace | None = None) -> None:
        """Run all jobs that have no result yet, and tell at the end which failed.

        Args:
            args: ``config``, the file, and ``output``, the run's folder or None; from the command line by default.

        Raises:
            ValueError: If the file lacks a section, or names an accelerator that is not there.
        """
        args = self.get_parser().parse_args() if args is None else args
        config = self._get_args(args)
        check_config(config)
        self._folder = RunFolder(args.output or Path("results/benchmark") / Path(args.config).stem)
        runners = self._setup_runners(config)
        specs = [spec for name in accelerators(config) for spec in expand(name, config["benchmark"])]
        self._folder.root.mkdir(parents=True, exist_ok=True)
        if Path(args.config).resolve() != self._folder.config.resolve():
            shutil.copyfile(args.config, self._folder.config)
        self._folder.clear_work()
        for spec in specs:
            self._folder.forget_failure(spec.key)
        done = sum(self._folder.has_result(spec.key) for spec in specs)
        print(f"Benchmark in {self._folder.root}: {len(specs)} jobs, {done} of them done before", flush=True)

        for runner in runners:
            with suppress(SerialExecutionError):  # told below, with the reasons
                runner.run(config["benchmark"])
        self._folder.clear_work()
        keys = {spec.key for spec in specs}
        self.failures = [failure for failure in self._folder.failures() if failure.spec.key in keys]
        self._tell(len(specs))

    def _setup_runners(self, args: dict[str, Any]) -> list[Runner]:  # type: ignore[override]  # there a static method
        if "cuda" in accelerators(args) and not torch.cuda.is_available():
            msg = "accelerator must be one that this machine has, but is 'cuda', and torch finds no GPU; 'cpu' works"
            raise ValueError(msg)
        runners: list[Runner] = []
        for accelerator, chosen in zip(accelerators(args), super()._setup_runners(args), strict=True):
            generator = JobGenerator(accelerator, self._folder)
            if isinstance(chosen, AnomalibParallelRunner):
                runners.append(ParallelRunner(generator, chosen.n_jobs))
            else:
                runners.append(SerialRunner(generator))
        return runners

    def _tell(self, jobs: int) -> None:
        print(f"\n{jobs - len(self.failures)} of {jobs} jobs are done, {len(self.failures)} failed")
        for failure in self.failures:
            print(f"  {failure.title}: {failure.reason}")
        print(f"Report: python -m anomalib_cfa.benchmark report {self._folder.root}", flush=True)
