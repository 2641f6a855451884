"""The models that are measured, all with the same backbone weights, from a file, and the same pixels."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from anomalib.models import Cfa, Dfm, Padim, Patchcore
from timm.models import load_state_dict

from harness.store import Task

CFA, ANOMALIB_CFA, PADIM, DFM = "this Cfa", "anomalib's Cfa", "PaDiM", "DFM"
PATCHCORE_1, PATCHCORE_10 = "PatchCore 1 %", "PatchCore 10 %"
MODELS = (CFA, PADIM, DFM, PATCHCORE_1, ANOMALIB_CFA, PATCHCORE_10)


def build_model(task: Task) -> Any:  # one of five classes
    """The task's model: its ``model``, ``backbone``, ``size`` in pixels, ``seed`` and ``weights_path``.

    Without a ``weights_path`` the weights are random. ``options`` are arguments of this package's Cfa.
    """
    name, size, weights = task["model"], task["size"], task.get("weights_path")
    if name == CFA:
        options = {"backbone": task["backbone"], "image_size": size, "seed": task.get("seed", 0)}
        options |= {"pre_trained": weights is not None, "weights_path": weights, **task.get("options", {})}
        return Cfa(**options, evaluator=False, visualizer=False)
    shared: dict[str, Any] = {"backbone": task["backbone"], "evaluator": False, "visualizer": False}
    shared["pre_processor"] = Patchcore.configure_pre_processor((size, size))
    if name == ANOMALIB_CFA:
        # Anomalib's Cfa would otherwise download torchvision's weights.
        with patch("torchvision.models.get_model_weights", return_value=SimpleNamespace(DEFAULT=None)):
            model: Any = Cfa(**shared, **({"gamma_c": task["gamma_c"]} if "gamma_c" in task else {}))
        network = model.model.feature_extractor
    else:
        shared["pre_trained"] = False  # True would download from the hub
        if name == PADIM:
            model = Padim(**shared)
        elif name == DFM:
            model = Dfm(**shared)
        else:
            model = Patchcore(**shared, coreset_sampling_ratio=0.01 if name == PATCHCORE_1 else 0.1)
        network = model.model.feature_extractor.feature_extractor
    if weights is not None:
        missing = network.load_state_dict(load_state_dict(weights), strict=False).missing_keys
        if read := [key for key in missing if not key.endswith("num_batches_tracked") and "layer4" not in key]:
            read = [key for key in read if not key.startswith("fc")]
        if read:
            sys.exit(f"{Path(weights).name} lacks {read}")
    return model


def bank_size(model: Any) -> int | None:  # one of five classes
    """How many vectors a patch is compared with; None for a model without a memory bank."""
    bank = getattr(model.model, "memory_bank", None)
    if bank is None or isinstance(bank, list):
        return None
    if hasattr(bank, "centers"):
        return len(bank.centers)
    return int(bank.shape[1] if type(model).__name__ == "Cfa" else bank.shape[0])
