"""Arguments and values of earlier versions, and what they are called now: old configs and checkpoints go on working."""

import warnings
from typing import Any

from anomalib_cfa.loss import NU

OLD_NAMES = ("descriptor_start", "nu", "beta")
_SEARCHES = {"ivf": "two_level", "hnsw": "two_level"}


def from_old_names(
    *, descriptor_start: str | None = None, nu: float | None = None, beta: float | None = None, **unknown: Any
) -> dict[str, Any]:
    """Bring arguments of 0.1.0 to today's names, with a warning for each that is given.

    Raises:
        TypeError: If there never was an argument of one's name.
        ValueError: If ``descriptor_start`` is neither ``"whitened"`` nor ``"random"``.
    """
    if unknown:
        msg = f"Cfa has no argument {', '.join(map(repr, unknown))}"
        raise TypeError(msg)
    if descriptor_start is not None:
        _warn(
            "descriptor_start is part of whitening now, a number for a whitened start and None for a random one, "
            f"but {descriptor_start!r} was given: leave it out"
        )
    if nu not in (None, NU):
        _warn(f"nu is always {NU} now, as in the authors' code, but {nu!r} was given: leave it out")
    if beta is not None:
        _warn(f"beta is always 1 / i now, for which all images count alike, but {beta!r} was given: leave it out")
    if descriptor_start not in (None, "whitened", "random"):
        msg = f"descriptor_start must be 'whitened' or 'random', but is {descriptor_start!r}"
        raise ValueError(msg)
    return {"whitening": None} if descriptor_start == "random" else {}


def current_search(search: str) -> str:
    """The kind of search that took the place of one of 0.1.0's, with a warning."""
    if not isinstance(search, str) or search not in _SEARCHES:
        return search
    _warn(f"search {search!r} is called {_SEARCHES[search]!r} now")
    return _SEARCHES[search]


def _warn(text: str) -> None:
    warnings.warn(text, FutureWarning, stacklevel=4)
