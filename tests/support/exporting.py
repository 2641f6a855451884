"""Fitted models to export, and the runtimes that run the files."""

from pathlib import Path

import numpy as np
import torch

from anomalib_cfa import Cfa


def fitted(model: Cfa, images: int = 4) -> Cfa:
    """A memory bank and calibration of random images; an export asks for no more."""
    network = model.model.eval()
    images = torch.rand(images, 3, *model.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.fit([network.pyramid(images)])
        raw = network(images)
    post_processor = model.post_processor
    # The images' largest scores, and those of other images, are beyond: normalized ones are clamped there.
    for name, values in (("image", raw.pred_score), ("pixel", raw.anomaly_map)):
        getattr(post_processor, f"{name}_min").copy_(values.min() - 1)
        getattr(post_processor, f"{name}_max").copy_(values.max() + 1)
        getattr(post_processor, f"_{name}_threshold").copy_(values.median())
    return model.train()


def tiny(**arguments) -> Cfa:
    defaults = {"backbone": "test_resnet.r160_in1k", "pre_trained": False, "image_size": [64, 96], "visualizer": False}
    return Cfa(**(defaults | arguments))


def predict(model: Cfa, image: torch.Tensor) -> dict[str, np.ndarray]:
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        output = model.eval()(image)._asdict()
    for module, mode in modes.items():
        module.training = mode
    return {name: value.numpy() for name, value in output.items() if value is not None}


def run_onnx(path: Path, image: torch.Tensor) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"input": image.numpy()}), strict=True))


def run_openvino(path: Path, image: torch.Tensor, precision: str = "f32") -> dict[str, np.ndarray]:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return {next(iter(output.names)): value for output, value in compiled(image.numpy()).items()}


def assert_agree(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].shape == value.shape
        if value.dtype == bool:
            assert (ours[name] != value).mean() < 0.01, name
        else:
            np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name)
