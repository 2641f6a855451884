"""Checks of the model's hyper-parameters, in one place, before any work starts."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from anomalib_cfa.bank import BANK_BUILDERS, SEARCH_KINDS

SCORES = ("local", "nearest", "softmin", "calibrated")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "gamma_c": ("None or a number above 0", lambda value: value is None or (_is_number(value) and value > 0)),
    "gamma_d": ("an integer of at least 1", _is_positive_integer),
    "num_nearest_neighbors": ("an integer of at least 1", _is_positive_integer),
    "num_hard_negative_features": (
        "an integer of at least 0",
        lambda value: (value == 0 and not isinstance(value, bool | float)) or _is_positive_integer(value),
    ),
    "radius": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "alpha": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "bank": (f"one of {', '.join(map(repr, BANK_BUILDERS))}", lambda value: value in BANK_BUILDERS),
    "whitening": (
        "None or a number from 0 to 1",
        lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
    ),
    "score": ("one of " + ", ".join(map(repr, SCORES)), lambda value: value in SCORES),
    "search": (f"one of {', '.join(map(repr, SEARCH_KINDS))}", lambda value: value in SEARCH_KINDS),
    "sigma": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "pre_trained": ("True or False", lambda value: isinstance(value, bool)),
    "learn_radius": ("True or False", lambda value: isinstance(value, bool)),
    "center_view": ("True or False", lambda value: isinstance(value, bool)),
    "lr": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "weight_decay": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "seed": (  # FAISS takes no larger one
        "an integer of at least 0 and below 2^31",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31,
    ),
    "feature_budget": ("a number of GiB of at least 0", lambda value: _is_number(value) and value >= 0),
}


def check_hyperparameters(**hyperparameters: Any) -> None:  # noqa: ANN401
    """Check hyper-parameters given by name.

    Raises:
        ValueError: Naming the first that is out of its range, what it must be, and what it was.
    """
    for name, value in hyperparameters.items():
        requirement, holds = _RULES[name]
        if not holds(value):
            msg = f"{name} must be {requirement}, but is {value!r}"
            raise ValueError(msg)
    gamma_c, bank = hyperparameters.get("gamma_c", 1), hyperparameters.get("bank", "kmeans")
    if gamma_c is not None and gamma_c < 1 and bank != "kmeans":
        msg = f"gamma_c must be at least 1 where bank is {bank!r}, which makes no more centres than T, but is {gamma_c}"
        raise ValueError(msg)


def check_neighbors(centers: int, num_nearest_neighbors: int, num_hard_negative_features: int) -> None:
    """Check that a memory bank has a centre for each target.

    Raises:
        ValueError: If it has fewer than K + J.
    """
    if num_nearest_neighbors + num_hard_negative_features > centers:
        msg = (
            "num_nearest_neighbors + num_hard_negative_features must be at most the memory bank's size of "
            f"{centers} centres, but is {num_nearest_neighbors} + {num_hard_negative_features}; "
            "lower gamma_c or use larger images"
        )
        raise ValueError(msg)


def plain_list(values: Any) -> Any:  # noqa: ANN401
    """A plain list of what may be a tuple or OmegaConf's list, which no checkpoint may hold; all else as it is."""
    return list(values) if isinstance(values, Sequence) and not isinstance(values, str) else values
