"""One model, exported once to each format for all tests: an export is most of the work here."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exporting import fitted, tiny

from anomalib_cfa import Cfa


@pytest.fixture(scope="session")
def two_labels() -> list[torch.Tensor]:
    """Images between whose scores the model's threshold lies."""
    return [torch.rand(1, 3, 64, 96), torch.zeros(1, 3, 64, 96)]


@pytest.fixture(scope="session")
def model(two_labels) -> Cfa:
    """A model whose bank is searched in two levels; smaller ones are ranked whole."""
    model = fitted(tiny(), images=28)
    assert model.model.memory_bank.index.has_two_levels
    with torch.no_grad():
        raw = torch.cat([model.model(model.pre_processor(image)).pred_score for image in two_labels])
    post_processor, between = model.post_processor, raw.max() - raw.min()
    post_processor._image_threshold.copy_(raw.mean())
    post_processor.image_min.copy_(raw.min() - between)
    post_processor.image_max.copy_(raw.max() + between)
    return model


@pytest.fixture(scope="session")
def exporters_log() -> list[logging.LogRecord]:
    return []


@pytest.fixture(scope="session")
def onnx_path(model, exporters_log, tmp_path_factory) -> Path:
    root, handler = logging.getLogger(), logging.Handler()
    handler.emit, level = exporters_log.append, root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        return model.to_onnx(tmp_path_factory.mktemp("onnx"))
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def onnx_once(tmp_path_factory) -> Callable[..., Path]:
    """Stands in for ``to_onnx``, and exports one model at one input size once."""
    export, files = Cfa.to_onnx, {}

    def to_onnx(self, export_root, model_file_name="model", input_size=None):
        if (self, input_size) not in files:
            files[self, input_size] = export(self, tmp_path_factory.mktemp("once"), input_size=input_size)
        export_root.mkdir()
        return shutil.copy(files[self, input_size], export_root / f"{model_file_name}.onnx")

    return to_onnx


@pytest.fixture(scope="session")
def openvino_path(model, onnx_once, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cfa, "to_onnx", onnx_once)
        return model.to_openvino(tmp_path_factory.mktemp("openvino"))
