"""The memory bank: its centres, how they are built, searched and calibrated."""

from anomalib_cfa.bank.builders import BANK_BUILDERS, EmaBank, KMeansBank, MeanBank
from anomalib_cfa.bank.calibration import CenterCalibration
from anomalib_cfa.bank.memory_bank import MemoryBank
from anomalib_cfa.bank.sample import PatchSample
from anomalib_cfa.bank.search import SEARCH_KINDS

__all__ = [
    "BANK_BUILDERS",
    "SEARCH_KINDS",
    "CenterCalibration",
    "EmaBank",
    "KMeansBank",
    "MeanBank",
    "MemoryBank",
    "PatchSample",
]
