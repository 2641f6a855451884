"""Generates the jobs of a run that are not settled yet."""

from collections.abc import Generator
from typing import Any

from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator

from anomalib_cfa.benchmark.folder import RunFolder
from anomalib_cfa.benchmark.job import Job
from anomalib_cfa.benchmark.labels import label_settings
from anomalib_cfa.benchmark.spec import expand


class JobGenerator(BenchmarkJobGenerator):
    """Anomalib's generator of benchmark jobs, without those that are settled in the run's folder.

    Args:
        accelerator: ``"cpu"`` or ``"cuda"``.
        folder: The run's folder.

    Attributes:
        handed_out: The jobs generated so far.
    """

    def __init__(self, accelerator: str, folder: RunFolder) -> None:
        super().__init__(accelerator)
        self.folder = folder
        self.handed_out: list[Job] = []

    @property
    def job_class(self) -> type[Job]:
        """The class of the jobs."""
        return Job

    def generate_jobs(
        self, args: dict[str, Any] | None = None, prev_stage_result: object = None
    ) -> Generator[Job, None, None]:
        """Generate the jobs, which cost nothing until they run.

        Args:
            args: The ``benchmark`` section of the file.
            prev_stage_result: Not used.
        """
        del prev_stage_result
        specs = list(expand(self.accelerator, args or {}))
        titles = {
            spec.key: f"{spec.category}, seed {spec.seed} ({label})"
            for spec, label in zip(specs, label_settings(specs), strict=True)
        }
        unsettled = [spec for spec in specs if not self.folder.is_settled(spec.key)]
        for number, spec in enumerate(unsettled, start=1):
            job = Job(spec, self.folder, titles[spec.key], number, len(unsettled))
            self.handed_out.append(job)
            yield job
