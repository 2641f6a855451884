"""The memory bank: its centres, how they are built, searched and calibrated."""
