"""Arguments and values of earlier versions, and what they are called now: old configs and checkpoints go on working."""

import warnings
from typing import Any

_SEARCHES = ("ivf", "hnsw")


def from_old_names(
    *, descriptor_start: str | None = None, nu: float | None = None, beta: float | None = None
) -> dict[str, Any]:
    """Bring arguments of 0.1.0 to today's names, with a warning for each that is given.

    Args:
        descriptor_start: ``"whitened"`` or ``"random"``; now part of ``whitening``.
        nu: Now a constant, that of the authors' code.
        beta: Now always 1 / i, for which an EMA weighs all images alike.

    Returns:
        Today's arguments.
    """
    if descriptor_start is not None:
        _warn("descriptor_start is part of whitening now, a number for a whitened start and None for a random one")
    if nu is not None:
        _warn(f"nu is not heeded, it is 0.001 as in the authors' code, but {nu!r} was given")
    if beta is not None:
        _warn(f"beta is not heeded, it is 1 / i, for which all images count alike, but {beta!r} was given")
    return {"whitening": None} if descriptor_start == "random" else {}


def current_search(search: str) -> str:
    """The kind of search that took the place of one of 0.1.0's, with a warning."""
    if search not in _SEARCHES:
        return search
    _warn(f"search must be 'two_level' or 'exact' now, but is {search!r}: 'two_level' is taken")
    return "two_level"


def _warn(text: str) -> None:
    warnings.warn(text, FutureWarning, stacklevel=4)
