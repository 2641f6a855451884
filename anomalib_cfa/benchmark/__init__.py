"""Anomalib's benchmark pipeline for runs of hours: resumable, a failure costs one job, and a report at the end.

``python -m anomalib_cfa.benchmark --config FILE [--output DIR]`` takes the file that ``anomalib benchmark`` takes;
``python -m anomalib_cfa.benchmark report DIR`` turns the results into Markdown, pictures and CSV.
"""

from anomalib_cfa.benchmark.pipeline import Benchmark
from anomalib_cfa.benchmark.report import write_report

__all__ = ["Benchmark", "write_report"]
