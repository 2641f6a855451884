"""A Cfa of a tiny backbone with random weights, fitted without a trainer: thousands of cases take minutes."""

from pathlib import Path

import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from torch import Tensor

from anomalib_cfa import Cfa


def tiny_cfa(**arguments) -> Cfa:
    """A Cfa of timm's smallest ResNet with random weights, for images of 64 x 64 pixels."""
    defaults = {"backbone": "test_resnet.r160_in1k", "pre_trained": False, "image_size": 64, "visualizer": False}
    return Cfa(**(defaults | arguments))


@torch.no_grad()
def fit_to_noise(model: Cfa, images: int = 4) -> Cfa:
    """Give a model what a fit gives it, from random images: a memory bank, its calibration, range and thresholds."""
    network = model.model.eval()
    size = model.input_size or (64, 64)
    network.fit([network.pyramid(noise(images, *size))])
    values = network(noise(images, *size, seed=1))
    post = model.post_processor
    for name, scores in (("image", values.pred_score), ("pixel", values.anomaly_map)):
        getattr(post, f"{name}_min").copy_(scores.min())
        getattr(post, f"{name}_max").copy_(scores.max() + 1)
        getattr(post, f"_{name}_threshold").copy_(scores.mean())
    return model.eval()


def noise(images: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Random images of shape (images, 3, height, width) in [0, 1]."""
    return torch.rand(images, 3, height, width, generator=torch.Generator().manual_seed(seed))


def engine(folder: Path, **arguments) -> Engine:
    """An engine of one epoch on the CPU that writes to a folder."""
    defaults = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return Engine(default_root_dir=folder, **(defaults | arguments))


def mvtec(root: Path, **arguments) -> MVTecAD:
    """The rendered tiles."""
    defaults = {"category": "tile", "train_batch_size": 2, "eval_batch_size": 4, "num_workers": 0}
    return MVTecAD(root, **(defaults | arguments))
