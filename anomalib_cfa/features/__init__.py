"""Images -> feature pyramid of a frozen, pre-trained backbone."""

from anomalib_cfa.features.patch_features import PatchFeatures

__all__ = ["PatchFeatures"]
