"""Data modules that anomalib lacks."""

from anomalib_cfa.data.rotated import RandomPose, RotatedMVTecAD

__all__ = ["RandomPose", "RotatedMVTecAD"]
