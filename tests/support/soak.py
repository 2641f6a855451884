"""How many cases the long tests try: few by default, thousands with ``ANOMALIB_CFA_SOAK=1`` (``make soak``)."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

SOAK = os.environ.get("ANOMALIB_CFA_SOAK", "0") != "0"


def count(quick: int, soak: int) -> int:
    """A number of cases."""
    return soak if SOAK else quick


def cases(quick: int, soak: int) -> Callable[[Any], Any]:
    """Hypothesis settings for a number of cases; the quick ones are the same in each run."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=count(quick, soak), deadline=None, derandomize=not SOAK, suppress_health_check=slow)
