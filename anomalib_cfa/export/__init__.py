"""Export to torch, ONNX and OpenVINO."""

from anomalib_cfa.export.mixin import CfaExport

__all__ = ["CfaExport"]
