"""One page on which a person judges a model: ``python -m anomalib_cfa.inspect MODEL FOLDER``."""

from anomalib_cfa.inspect.inspection import inspect_folder

__all__ = ["inspect_folder"]
