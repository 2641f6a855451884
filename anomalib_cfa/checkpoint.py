"""Checks of a checkpoint before its weights are loaded."""

from collections.abc import Mapping
from typing import Any

# What the shapes of the weights, or the meaning of the bank, depend on.
_STRUCTURE = ("backbone", "layers", "gamma_c", "gamma_d", "num_nearest_neighbors", "num_hard_negative_features")


def check_checkpoint(checkpoint: Mapping[str, Any], hyperparameters: Mapping[str, Any]) -> None:
    """Check that a checkpoint was written by this package's Cfa, with the structure that the model was built with.

    Args:
        checkpoint: The loaded checkpoint.
        hyperparameters: The model's own.

    Raises:
        ValueError: If it was not, naming what differs and what to do.
    """
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
    saved = checkpoint.get("hyper_parameters", {})
    for name in _STRUCTURE:
        if name in saved and saved[name] != hyperparameters.get(name):
            msg = (
                f"{name} must be {saved[name]!r}, as it was when the checkpoint was written, but is "
                f"{hyperparameters.get(name)!r}; on the command line: --model.{name} {saved[name]}"
            )
            raise ValueError(msg)
