"""The demo: `python -m anomalib_cfa.demo` renders a data set, trains on it, exports and finds its defects."""
