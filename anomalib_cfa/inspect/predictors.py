"""A checkpoint or an exported model -> predictions."""

import logging
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.deploy import OpenVINOInferencer
from anomalib.models.components import AnomalibModule
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype, to_image

from anomalib_cfa.inspect.pictures import View
from anomalib_cfa.inspect.reasons import Reason, find_reason
from anomalib_cfa.lightning_model import Cfa
from anomalib_cfa.pre_processing import visible_part

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image."""

    score: float  # the image's score
    anomaly_map: NDArray[np.float32]  # scores of its pixels, as large as the model's view of the image
    label: bool | None = None  # the model's own verdict; None if it gives none
    mask: NDArray[np.bool_] | None = None  # pixels that the model calls defective; None if it gives none
    reason: Reason | None = None  # what the worst patch was compared with, if the model can tell


class ModelPredictor:
    """A fitted model.

    Args:
        model: Any of anomalib's; this package's Cfa tells the reasons for its scores, too.
        device: Where to compute. Default: on a GPU if there is one.
        checkpoint: The file that it is from.

    Attributes:
        view: What it sees of an image, see :func:`~anomalib_cfa.pre_processing.visible_part`.
    """

    def __init__(self, model: AnomalibModule, device: str | None = None, checkpoint: Path | None = None) -> None:
        self.checkpoint = checkpoint
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = model.eval().to(self._device)
        self.view = visible_part(model.pre_processor)
        if self.view is None:
            logger.warning(
                "The model's pre_processor changes the shape of images in a way that the page cannot follow: heat maps "
                "are stretched over the whole image, and neither true masks nor reasons are shown"
            )

    @torch.inference_mode()
    def predict(self, image: Image.Image) -> Prediction:
        """Predict an RGB image."""
        batch = to_dtype(to_image(image), torch.float32, scale=True)[None].to(self._device)
        if not isinstance(self._model, Cfa):
            return _prediction(self._model(batch), None)
        described: list[Tensor] = []
        with self._model.model.descriptor.register_forward_hook(lambda *seen: described.append(seen[-1])):
            output = self._model(batch)
        # The whole image's; those of its centre crop may follow.
        return _prediction(output, None if self.view is None else find_reason(self._model, described[0][0]))


class OpenVINOPredictor:
    """An exported model (``.xml`` or ``.onnx``), by anomalib's inferencer, on a device of OpenVINO's name.

    It does not tell what it sees of an image: where it crops, the heat map is stretched over the whole of it.
    """

    view: View = (0.0, 0.0, 1.0, 1.0)
    checkpoint: Path | None = None

    def __init__(self, path: Path, device: str | None = None) -> None:
        path, before = path.resolve(), Path.cwd()
        # The inferencer leaves its cache in the working directory.
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            os.chdir(folder)
            try:
                self._inferencer = OpenVINOInferencer(path, device or "CPU")
            finally:
                os.chdir(before)

    def predict(self, image: Image.Image) -> Prediction:
        """Predict an RGB image."""
        return _prediction(self._inferencer.predict(image), None)


def _prediction(output: Any, reason: Reason | None) -> Prediction:  # torch's or NumPy's batch of one
    values = {}
    for name in ("pred_score", "anomaly_map", "pred_label", "pred_mask"):
        value = getattr(output, name, None)
        if value is not None:
            values[name] = np.squeeze(value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value))
    label, mask = values.get("pred_label"), values.get("pred_mask")
    # A model without thresholds gives back scores in place of labels.
    return Prediction(
        score=float(values["pred_score"]),
        anomaly_map=values["anomaly_map"].astype(np.float32),
        label=bool(label) if label is not None and label.dtype == bool else None,
        mask=mask if mask is not None and mask.dtype == bool else None,
        reason=reason,
    )


Predictor = ModelPredictor | OpenVINOPredictor


def load_predictor(path: Path, device: str | None = None) -> Predictor:
    """Load a checkpoint (``.ckpt``) or an exported model (``.xml``, ``.onnx``).

    Raises:
        ValueError: If there is no such file, or it is something else.
    """
    if not path.is_file():
        msg = f"model must be an existing file, but is {str(path)!r}"
        raise ValueError(msg)
    if path.suffix == ".ckpt":
        try:
            model = Cfa.load_from_checkpoint(path, map_location="cpu")
        except (pickle.UnpicklingError, EOFError, TypeError) as error:  # the last: arguments of another model
            msg = f"model must be a checkpoint of this Cfa, but {str(path)!r} is none, or is damaged"
            raise ValueError(msg) from error
        return ModelPredictor(model, device, path)
    if path.suffix in {".xml", ".onnx"}:
        return OpenVINOPredictor(path, device)
    msg = f"model must be a checkpoint (.ckpt) or an exported model (.xml, .onnx), but is {str(path)!r}"
    raise ValueError(msg)
