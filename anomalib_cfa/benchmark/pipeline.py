"""Anomalib's benchmark pipeline with a run folder: what is finished survives an interruption."""

import multiprocessing
import shutil
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from anomalib.pipelines import Benchmark as AnomalibBenchmark
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator
from anomalib.pipelines.components.base import Runner
from anomalib.pipelines.components.runners import ParallelRunner as AnomalibParallelRunner
from anomalib.pipelines.components.runners import SerialRunner
from anomalib.pipelines.components.runners.parallel import ParallelExecutionError
from anomalib.pipelines.components.runners.serial import SerialExecutionError
from jsonargparse import ArgumentParser, Namespace

from anomalib_cfa.benchmark.folder import Failure, RunFolder
from anomalib_cfa.benchmark.job import Job
from anomalib_cfa.benchmark.spec import accelerators, check_config, expand
from anomalib_cfa.benchmark.tables import label_settings


class JobGenerator(BenchmarkJobGenerator):
    """Anomalib's generator of benchmark jobs, without those that are already settled in the run's folder."""

    def __init__(self, accelerator: str, folder: RunFolder) -> None:
        super().__init__(accelerator)
        self.folder = folder
        self.generated: list[Job] = []

    @property
    def job_class(self) -> type[Job]:
        """The class of the jobs."""
        return Job

    def generate_jobs(
        self, args: dict[str, Any] | None = None, prev_stage_result: object = None
    ) -> Generator[Job, None, None]:
        """Generate the jobs of a file's ``benchmark`` section, which cost nothing until they run."""
        del prev_stage_result
        specs = list(expand(self.accelerator, args or {}))
        labels = label_settings(specs)
        unsettled = [pair for pair in zip(specs, labels, strict=True) if not self.folder.is_settled(pair[0].key)]
        for number, (spec, label) in enumerate(unsettled, start=1):
            title = f"{spec.category}, seed {spec.seed} ({label})"
            self.generated.append(Job(spec, self.folder, title, number, len(unsettled)))
            yield self.generated[-1]


class ParallelRunner(AnomalibParallelRunner):
    """Anomalib's parallel runner, which sleeps while it waits, and goes on when a process is killed.

    There are ``n_jobs`` processes, one for each GPU. One that dies, perhaps out of memory, breaks the pool without
    saying which job killed it. So each job that was under way is run once more alone, which settles it, and the others
    go on in a new pool.
    """

    generator: JobGenerator

    def run(self, args: dict[str, Any], prev_stage_results: object = None) -> None:
        """Run the jobs until each is settled, that is, its result or its failure is saved."""
        while True:
            with suppress(BrokenProcessPool, ParallelExecutionError):
                super().run(args, prev_stage_results)
            interrupted = [job for job in self.generator.generated if not job.folder.is_settled(job.spec.key)]
            if not interrupted:
                return
            for job in interrupted:
                _settle_alone(job)

    def _await_cleanup_processes(self, blocking: bool = False) -> None:
        running = [process for process in self.processes.values() if process is not None]
        if running and not blocking:
            wait(running, return_when=FIRST_COMPLETED)
        super()._await_cleanup_processes(blocking)


def _settle_alone(job: Job) -> None:
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as executor:
        try:
            executor.submit(job.run, task_id=0).result()
        except BrokenProcessPool:
            job.fail("the process died twice, perhaps out of memory")
        except Exception as error:  # noqa: BLE001 - usually saved by the job itself
            if not job.folder.is_settled(job.spec.key):
                job.fail(f"{type(error).__name__}: {error}")


class Benchmark(AnomalibBenchmark):
    """Anomalib's benchmark, for runs of hours.

    It takes anomalib's file: ``accelerator``, and ``benchmark`` with ``seed``, ``model`` and ``data``, each value of
    which may be a ``grid``. Beyond that it reads two things that anomalib's own command ignores or refuses: a
    ``trainer`` section in ``benchmark``, with plain arguments of Lightning's trainer such as ``max_epochs``, and the
    full class path of another package's data module.

    Each job's result is saved when it is finished. A run with the same folder runs what is missing, retries what
    failed, and leaves results of other settings alone.

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
        """Run all jobs that have no result yet, and list at the end those that failed.

        ``args`` are ``config``, the file, and ``output``, the run's folder or None; from the command line by default.

        Raises:
            ValueError: If the file lacks a section, or names an accelerator that this machine does not have.
        """
        args = self.get_parser().parse_args() if args is None else args
        config = self._get_args(args)
        check_config(config)
        self._folder = folder = RunFolder(args.output or Path("results/benchmark") / Path(args.config).stem)
        runners = self._setup_runners(config)
        keys = {spec.key for name in accelerators(config) for spec in expand(name, config["benchmark"])}
        folder.root.mkdir(parents=True, exist_ok=True)
        if Path(args.config).resolve() != folder.config.resolve():
            shutil.copyfile(args.config, folder.config)
        shutil.rmtree(folder.work, ignore_errors=True)  # an interrupted run's
        for key in keys:
            folder.forget_failure(key)
        done = sum(folder.has_result(key) for key in keys)
        print(f"Benchmark in {folder.root}: {len(keys)} jobs, {done} already done", flush=True)

        for runner in runners:
            with suppress(SerialExecutionError):  # listed below, with the reasons
                runner.run(config["benchmark"])
        shutil.rmtree(folder.work, ignore_errors=True)
        self.failures = [failure for failure in folder.failures() if failure.spec.key in keys]
        print(f"\n{len(keys) - len(self.failures)} of {len(keys)} jobs are done, {len(self.failures)} failed")
        for failure in self.failures:
            print(f"  {failure.title}: {failure.reason}")
        print(f"Report: python -m anomalib_cfa.benchmark report {folder.root}", flush=True)

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
