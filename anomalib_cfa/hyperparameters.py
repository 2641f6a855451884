"""Checks of the model's arguments, in one place, before any work starts."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from anomalib.metrics import Evaluator
from anomalib.visualization import Visualizer
from torch import nn

from anomalib_cfa.bank.builders import BANK_BUILDERS
from anomalib_cfa.bank.search import SEARCH_KINDS

SCORES = ("local", "nearest", "softmin", "calibrated")
DEFAULT_FALSE_ALARM_RATE = 0.01

Rule = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words, and whether one is that."""


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(_is_integer(side, 1) for side in value)


def _are_different_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value)) and 0 < len(value) == len(set(value))


def _integer(words: str, least: int, most: float = math.inf) -> Rule:
    return f"an integer {words}", lambda value: _is_integer(value, least) and value <= most


def _number(words: str, holds: Callable[[float], bool]) -> Rule:
    def is_number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    return f"a number {words}", lambda value: is_number(value) and holds(value)


def _above_zero(most: int) -> Rule:
    return _number(f"above 0 and at most {most}", lambda value: 0 < value <= most)


def _from_zero(most: int) -> Rule:
    return _number(f"from 0 to {most}", lambda value: 0 <= value <= most)


def _choice(values: Collection[str]) -> Rule:
    return f"one of {', '.join(map(repr, values))}", lambda value: isinstance(value, str) and value in values


def _component(name: str, kind: type) -> Rule:
    return f"True, False or {name}", lambda value: isinstance(value, bool | kind)


def _or_none(rule: Rule) -> Rule:
    words, holds = rule
    return f"None or {words}", lambda value: value is None or holds(value)


_FLAG: Rule = ("True or False", lambda value: isinstance(value, bool))
_SIZE: Rule = (
    "None, a positive integer or a pair of them (height, width)",
    lambda value: value is None or _is_integer(value, 1) or _is_pair(value),
)
_MOST_NEIGHBORS = 256  # the search compares a patch with about a thousand centres

RULES: dict[str, Rule] = {  # of the constructor's arguments
    "backbone": ("the name of a timm model", _is_text),
    "gamma_c": _or_none(_number("above 0", lambda value: value > 0)),
    "gamma_d": _integer("of at least 1", 1),
    "num_nearest_neighbors": _integer(f"from 1 to {_MOST_NEIGHBORS}", 1, _MOST_NEIGHBORS),
    "num_hard_negative_features": _integer(f"from 0 to {_MOST_NEIGHBORS}", 0, _MOST_NEIGHBORS),
    "radius": _from_zero(1000),  # a patch lies at a distance of about 1
    "pre_processor": _component("a torch module such as anomalib's PreProcessor", nn.Module),
    "post_processor": _component("a torch module such as anomalib's PostProcessor", nn.Module),
    "evaluator": _component("anomalib's Evaluator", Evaluator),
    "visualizer": _component("anomalib's Visualizer", Visualizer),
    "layers": _or_none(("a list of different names of layers", _are_different_names)),
    "pre_trained": _FLAG,
    "weights_path": _or_none(("the path of a file", lambda value: isinstance(value, Path) or _is_text(value))),
    "bank": _choice(BANK_BUILDERS),
    "whitening": _or_none(_from_zero(1)),
    "learn_radius": _FLAG,
    "alpha": _from_zero(10**6),
    "search": _choice(SEARCH_KINDS),
    "lr": _above_zero(1000),
    "weight_decay": _from_zero(1000),
    "score": _choice(SCORES),
    "sigma": _above_zero(1000),
    "center_view": _FLAG,
    "seed": _integer("of at least 0 and below 2^31", 0, 2**31 - 1),
    "image_size": _SIZE,
    "center_crop_size": _SIZE,
    "false_alarm_rate": _number("above 0 and below 0.5", lambda value: 0 < value < 0.5),  # at 0.5 a range is empty
    "feature_budget": _number("of GiB of at least 0", lambda value: value >= 0),
}

EXPORT_RULES: dict[str, Rule] = {
    "input_size": _or_none(("a pair of positive integers (height, width)", _is_pair)),
    "max_drop": _from_zero(1),
}


def check_arguments(rules: Mapping[str, Rule], **arguments: Any) -> None:
    """Raise a ValueError if an argument is not what its rule says, naming it, what it must be, and what it was."""
    for name, value in arguments.items():
        requirement, holds = rules[name]
        if not holds(value):
            msg = f"{name} must be {requirement}, but is {value!r}"
            raise ValueError(msg)


def check_hyperparameters(**hyperparameters: Any) -> None:
    """Check arguments given by name.

    Raises:
        ValueError: Naming the first that is out of its range or contradicts another, what it must be, and what it was.
    """
    check_arguments(RULES, **hyperparameters)
    gamma_c, bank = hyperparameters.get("gamma_c"), hyperparameters.get("bank", "kmeans")
    if gamma_c is not None and gamma_c < 1 and bank != "kmeans":
        msg = f"gamma_c must be at least 1 where bank is {bank!r}, which makes no more centres than T, but is {gamma_c}"
        raise ValueError(msg)
    if hyperparameters.get("pre_processor", True) is not True:
        for name in ("image_size", "center_crop_size"):
            if hyperparameters.get(name) is not None:
                msg = (
                    "image_size and center_crop_size must not be given beside a pre_processor, which has its own "
                    f"sizes, but {name} is {hyperparameters[name]!r}"
                )
                raise ValueError(msg)
    rate = hyperparameters.get("false_alarm_rate", DEFAULT_FALSE_ALARM_RATE)
    if hyperparameters.get("post_processor", True) is not True and rate != DEFAULT_FALSE_ALARM_RATE:
        msg = f"false_alarm_rate must not be given beside a post_processor, which has its own rule, but is {rate!r}"
        raise ValueError(msg)


def check_neighbors(centers: int, num_nearest_neighbors: int, num_hard_negative_features: int) -> None:
    """Raise a ValueError if a memory bank of so many centres does not have one for each of the K + J targets."""
    if num_nearest_neighbors + num_hard_negative_features > centers:
        msg = (
            "num_nearest_neighbors + num_hard_negative_features must be at most the memory bank's size of "
            f"{centers} centres, but is {num_nearest_neighbors} + {num_hard_negative_features}; "
            "lower gamma_c or use larger images"
        )
        raise ValueError(msg)


def plain(value: Any) -> Any:
    """A Python number, string or list of what may be NumPy's or OmegaConf's, which no checkpoint may hold."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return [plain(part) for part in value] if is_list else value
