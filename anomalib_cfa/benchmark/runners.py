"""Runs jobs on several GPUs, and outlives a process that dies."""

import multiprocessing
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

from anomalib.pipelines.components.runners import ParallelRunner as AnomalibParallelRunner
from anomalib.pipelines.components.runners.parallel import ParallelExecutionError

from anomalib_cfa.benchmark.generator import JobGenerator
from anomalib_cfa.benchmark.job import Job


class ParallelRunner(AnomalibParallelRunner):
    """Anomalib's parallel runner, which sleeps while it waits, and goes on when a process is killed.

    A process that dies, for want of memory perhaps, breaks the whole pool, and nothing tells which job killed it. So
    each job that was under way is run once more alone, which settles it, and the others go on in a new pool.

    Args:
        generator: Generates the jobs that are not settled.
        n_jobs: Number of processes, one for each GPU.
    """

    generator: JobGenerator

    def run(self, args: dict[str, Any], prev_stage_results: object = None) -> None:
        """Run the jobs until each is settled: finished or failed, on disk.

        Args:
            args: The ``benchmark`` section of the file.
            prev_stage_results: Not used.
        """
        while True:
            with suppress(BrokenProcessPool, ParallelExecutionError):
                super().run(args, prev_stage_results)
            interrupted = [job for job in self.generator.handed_out if not job.folder.is_settled(job.spec.key)]
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
            job.fail("the process died twice, for want of memory perhaps")
        except Exception as error:  # noqa: BLE001 - usually noted by the job itself already
            if not job.folder.is_settled(job.spec.key):
                job.fail(f"{type(error).__name__}: {error}")
