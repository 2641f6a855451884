"""Builds the model that is measured, and its input."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from anomalib.data.utils import read_image
from anomalib.models import Cfa
from torch import Tensor


def build_model(task: dict[str, Any]) -> Any:  # noqa: ANN401 - one of two classes
    """The model of the task's side; both get the same backbone weights, random ones if there is no file."""
    size, weights = (task["size"], task["size"]), task.get("weights_path")
    settings: dict[str, Any] = {
        "backbone": task["backbone"],
        "pre_processor": Cfa.configure_pre_processor(size),
        "evaluator": False,
        "visualizer": False,
        **({"gamma_c": task["gamma_c"]} if "gamma_c" in task else {}),
    }
    if task["side"] == "ours":
        settings |= {"pre_trained": weights is not None, "weights_path": weights, **task.get("options", {})}
        return Cfa(**settings)
    # Anomalib's own would download torchvision's weights.
    with patch("torchvision.models.get_model_weights", return_value=SimpleNamespace(DEFAULT=None)):
        model = Cfa(**settings)
    if weights is not None:
        from timm.models import load_state_dict  # noqa: PLC0415 - reads both kinds of file

        model.model.feature_extractor.load_state_dict(load_state_dict(weights), strict=False)
    return model


def load_image(model: Any, path: Path) -> Tensor:  # noqa: ANN401 - one of two classes
    """A batch of one image that has passed the pre-processor."""
    image: Tensor = model.pre_processor.transform(read_image(path, as_tensor=True))
    return image[None]
