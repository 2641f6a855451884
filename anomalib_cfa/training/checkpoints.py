"""Checks of a checkpoint before its weights are loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Buffers take whatever size a checkpoint brings, but these must agree: N centres of D channels. None: any number.
_SIZES: dict[str, tuple[str | None, ...]] = {
    "model.descriptor.weight": ("D", None),
    "model.memory_bank.centers": ("N", "D"),
    "model.calibration.mean": ("N",),
    "model.calibration.deviation": ("N",),
}


def check_checkpoint(checkpoint: Mapping[str, Any]) -> None:
    """Raise a ValueError if a checkpoint is not of this package's Cfa, saying what to do, or is damaged."""
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping):
        msg = "The checkpoint must hold a state_dict, but has none: it is not a Lightning checkpoint, or is damaged"
        raise ValueError(msg)  # noqa: TRY004 - of the file's content, not of an argument
    if "model.memory_bank" in state:
        msg = (
            "The checkpoint is of anomalib's own Cfa, whose memory bank and descriptor differ from anomalib-cfa's: "
            "train again, or set ANOMALIB_CFA_REGISTER=0 to use it with anomalib's own Cfa"
        )
        raise ValueError(msg)
    if "model.memory_bank.centers" not in state:
        msg = "The checkpoint must be one of anomalib-cfa's Cfa, but holds no model.memory_bank.centers"
        raise ValueError(msg)
    if not isinstance(checkpoint.get("hyper_parameters", {}), Mapping):
        msg = "The checkpoint must hold hyper_parameters by name, but they are of another type: it is damaged"
        raise ValueError(msg)  # noqa: TRY004
    _check_values(state)
    if state["model.memory_bank.centers"].numel():
        _check_sizes(state)


def _check_values(state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        if not name.startswith("model."):
            continue  # thresholds, for one, are nan until they are chosen
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            msg = f"The checkpoint must hold tensors, but its {name} is of type {type(value).__name__}: it is damaged"
            raise ValueError(msg)
        if not torch.isfinite(value).all():
            msg = f"The checkpoint must hold finite values, but its {name} has nan or infinite ones: it is damaged"
            raise ValueError(msg)
    if not state.get("model.calibration.deviation", torch.ones(1)).gt(0).all():
        msg = "The checkpoint must hold deviations above 0, but some in model.calibration.deviation are not"
        raise ValueError(msg)


def _check_sizes(state: Mapping[str, Any]) -> None:
    sizes: dict[str, tuple[int, str]] = {}  # of each letter, and the first tensor that has it
    for name, letters in _SIZES.items():
        if name not in state:
            continue  # torch names all that is missing
        shape = tuple(state[name].shape)
        if len(shape) != len(letters):
            msg = f"The checkpoint's {name} must have {len(letters)} dimensions, but has {len(shape)}: it is damaged"
            raise ValueError(msg)
        for letter, size in zip(letters, shape, strict=True):
            if letter is None:
                continue
            wanted, source = sizes.setdefault(letter, (size, name))
            if size != wanted:
                msg = f"The checkpoint's {name} has shape {shape}, which does not fit its {source}: it is damaged"
                raise ValueError(msg)
    count = len(state["model.memory_bank.centers"])
    sources = state.get("model.memory_bank.sources", torch.empty(0, 3))  # 0.1.0 has none
    if sources.shape not in {(0, 3), (count, 3)}:
        msg = (
            f"The checkpoint's model.memory_bank.sources must have shape (0, 3) or ({count}, 3), but has "
            f"{tuple(sources.shape)}: it is damaged"
        )
        raise ValueError(msg)
