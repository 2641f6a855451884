"""What a checkpoint says about the model's arguments, against those that a new model was given.

============= ====================================================================================================
saved         the checkpoint's, but for the components
given         the user's: of the constructor's those that differ from the defaults, of ``load_from_checkpoint`` all
changeable    what a fitted model does not depend on; while a fit goes on, its optimizer's are not among them
checked later what the network and the pre-processor tell, as it can be given in other words
============= ====================================================================================================

The model has what is saved, but what is given and changeable. All else that is given must be as it is saved.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from anomalib.pre_processing import PreProcessor
from torch import nn

from anomalib_cfa.features import PatchFeatures
from anomalib_cfa.features.backbones import find_backbone
from anomalib_cfa.hyperparameters import RULES
from anomalib_cfa.old_names import OLD_NAMES, current_search, from_old_names

UNSAVED_PRE_PROCESSING = "anomalib_cfa_unsaved_pre_processing"
"""Key of a checkpoint under which it says what anomalib could not save."""

COMPONENTS = ("pre_processor", "post_processor", "evaluator", "visualizer")

# What a fitted model does not depend on. Of a fit that goes on, lr and weight_decay are part of the optimizer's state.
_CHANGEABLE = frozenset({"pre_trained", "weights_path", "seed", "alpha", "feature_budget"})
_OF_THE_OPTIMIZER = frozenset({"lr", "weight_decay"})
# The network and the pre-processor tell what these come to, see `check_layers` and `check_pre_processing`.
_CHECKED_LATER = frozenset({"layers", "image_size", "center_crop_size"})
_PRE_PROCESSING = ("pre_processor", "image_size", "center_crop_size")


def given_arguments(arguments: Mapping[str, Any], model: type) -> dict[str, Any]:
    """The arguments that differ from the constructor's defaults: a command line passes all, given or not."""
    defaults = {name: parameter.default for name, parameter in signature(model).parameters.items()}
    return {name: value for name, value in arguments.items() if name in defaults and value != defaults[name]}


def current_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments under today's names, with a warning for each that has another one now."""
    current = {name: value for name, value in arguments.items() if name not in OLD_NAMES}
    current |= from_old_names(**{name: arguments[name] for name in OLD_NAMES if name in arguments})
    if "search" in current:
        current["search"] = current_search(current["search"])
    return current


def saved_arguments(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's hyper-parameters under today's names."""
    saved = current_arguments(checkpoint.get("hyper_parameters") or {})
    return {name: value for name, value in saved.items() if name in RULES and name not in COMPONENTS}


def merge(saved: Mapping[str, Any], given: Mapping[str, Any], *, fitting: bool) -> dict[str, Any]:
    """The arguments of the model that a checkpoint holds: the saved ones, and those given that may change afterwards.

    Where a fit goes on from the checkpoint (``fitting``), fewer of them may.

    Raises:
        ValueError: If one that is given contradicts the checkpoint, naming both values and what to type.
    """
    changeable = _CHANGEABLE if fitting else _CHANGEABLE | _OF_THE_OPTIMIZER
    for name in saved.keys() & given.keys() - changeable - _CHECKED_LATER:
        pair = saved[name], given[name]
        if name == "backbone":  # which may have two names
            pair = find_backbone(pair[0]).name, find_backbone(pair[1]).name
        if pair[0] != pair[1]:
            raise _contradiction(name, saved[name], given[name])
    free = {name for name in given if name in RULES and (name in changeable or name not in saved)}
    merged = {**saved, **{name: given[name] for name in free - {*COMPONENTS}}}
    if not merged.get("pre_trained", True):
        merged["weights_path"] = None
    return merged


def _contradiction(name: str, saved: object, given: object) -> ValueError:
    """The error for an argument that contradicts the checkpoint."""
    typed = saved if isinstance(saved, str) else json.dumps(saved)
    return ValueError(
        f"{name} must be {saved!r}, as it was when the checkpoint was written, or be left out, but is {given!r}; "
        f"on the command line: --model.{name} {shlex.quote(typed)}"
    )


def check_layers(restored: PatchFeatures, given: Sequence[str]) -> None:
    """Raise a ValueError if the layers that were given are not those of the checkpoint's network.

    A layer may have two names: of a stage, and of its last block.
    """
    saved = restored.requested_layers or restored.layers
    if set(given) not in (set(restored.layers), set(saved)):
        raise _contradiction("layers", list(saved), list(given))  # noqa: EM101 - a name, no message


def check_pre_processing(
    checkpoint: Mapping[str, Any], pre_processor: nn.Module | None, given: Mapping[str, Any]
) -> None:
    """Raise a ValueError if what was given of the pre-processing is not what the model was trained with, or lacks."""
    if "pre_processor" not in given and (unsaved := checkpoint.get(UNSAVED_PRE_PROCESSING)):
        msg = (
            "pre_processor must be given beside this checkpoint, as anomalib could not save the one that the model was "
            f"trained with, {unsaved}: Cfa.load_from_checkpoint(PATH, pre_processor=...), which can be exported, too"
        )
        raise ValueError(msg)
    given = {name: value for name, value in given.items() if name in _PRE_PROCESSING}
    enabled = (checkpoint.get("anomalib_components_enabled") or {}).get("pre_processor", True)
    saved = (checkpoint.get("anomalib_pre_processor_config") or {}).get("transform") if enabled else None
    ours = _transform(pre_processor)
    if not given or (enabled and (saved is None or ours == saved)):
        return  # anomalib saves nothing of a transform that it does not know
    hyperparameters = checkpoint.get("hyper_parameters") or {}
    if "pre_processor" in given:
        if pre_processor is None and not enabled:
            return
        what = "False" if not enabled else f"left out, or do what the checkpoint's does, {_words(saved)},"
        msg = f"pre_processor must be {what} but is {given['pre_processor']!r}"
        raise ValueError(msg)
    if not enabled:
        name = next(iter(given))
        msg = f"{name} must be left out, as the checkpoint's model was trained without a pre_processor"
        raise ValueError(msg)
    if _without_statistics(ours) != _without_statistics(saved):
        name = next((name for name in given if hyperparameters.get(name) != given[name]), next(iter(given)))
        raise _contradiction(name, hyperparameters.get(name), given[name])


def unsaved_pre_processing(pre_processor: nn.Module | None) -> str:
    """What anomalib cannot save of a pre-processor: most transforms, and what a subclass does; "" if it saves all."""
    kind: Any = type(pre_processor)
    is_own = issubclass(kind, PreProcessor) and kind is not PreProcessor
    if is_own and kind.checkpoint_config is PreProcessor.checkpoint_config:
        return str(kind.__name__)
    transform = getattr(pre_processor, "transform", pre_processor)
    return "" if transform is None or _transform(pre_processor) is not None else " ".join(repr(transform).split())


def _transform(pre_processor: nn.Module | None) -> Any:
    config: Any = getattr(pre_processor, "checkpoint_config", dict)()
    return config.get("transform")


def _parts(spec: Any) -> list[dict[str, Any]]:
    if spec is None:
        return []
    parts = spec.get("init_args", {}).get("transforms")
    return [spec] if parts is None else [part for inner in parts for part in _parts(inner)]


def _without_statistics(spec: Any) -> list[dict[str, Any]]:
    return [part for part in _parts(spec) if not part["class_path"].endswith(".Normalize")]


def _words(spec: Any) -> str:
    names = {"size": "", "mean": "mean ", "std": "std "}
    return ", ".join(
        f"{part['class_path'].rpartition('.')[2]} "
        + " ".join(f"{names[name]}{value}" for name, value in part["init_args"].items() if name in names)
        for part in _parts(spec)
    )
