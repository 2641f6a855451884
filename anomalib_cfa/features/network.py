"""Networks that give feature maps at chosen layers of a timm model, and keep nothing deeper."""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import timm
import torch
from timm.models import VGG, EfficientNet, FeatureInfo, ResNet
from torch import Tensor, nn
from torch.func import functional_call

from anomalib_cfa.features.same_padding import replace_same_padding


def build_network(
    name: str, layers: Sequence[str] | None = None, image_size: tuple[int, int] | None = None, **options: Any
) -> nn.Module:
    """Build a network that maps images (B, 3, H, W) to a list of maps (B, C, h, w), one per layer, in their order.

    Nothing deeper than the deepest layer is kept. The maps' channels and strides are in its ``feature_info``. Layers
    go by the names in timm's ``feature_info``; those of a ResNet, VGG or EfficientNet may be its single blocks too.
    None takes :func:`default_layers`. ``options`` are :func:`timm.create_model`'s.

    Raises:
        ValueError: If the model has no such layers, listing those that it has, or gives no feature maps.
    """
    with torch.device("meta"):  # costs nothing; timm tells a model's layers only once it is built
        model = _create(name, image_size, num_classes=0)
    info = getattr(model, "feature_info", None)
    if not info:
        msg = f"backbone must be a timm model with feature maps, but {name!r} has none"
        raise ValueError(msg)
    available = [entry["module"] for entry in info]
    if layers is None:
        indices = default_layers([entry["reduction"] for entry in info])
        return replace_same_padding(_create(name, image_size, features_only=True, out_indices=indices, **options))
    if set(layers) <= set(available):
        indices = sorted(available.index(layer) for layer in layers)
        return replace_same_padding(_create(name, image_size, features_only=True, out_indices=indices, **options))
    if isinstance(model, ResNet | VGG | EfficientNet):
        steps = list(_steps(model))
        available = list(dict.fromkeys([*available, *steps[: _last_inside(steps, available[-1]) + 1]]))
        if set(layers) <= set(available):
            return StepwiseFeatures(replace_same_padding(_create(name, image_size, num_classes=0, **options)), layers)
    unknown = [layer for layer in layers if layer not in available]
    msg = f"layers must be among those of {name!r}, but {unknown} are not; available: {', '.join(available)}"
    raise ValueError(msg)


def default_layers(strides: Sequence[int]) -> list[int]:
    """Of layers with these strides, in the order of their depth, the indices of those to take features from.

    They correspond to a ResNet's ``layer2`` and ``layer3``: the deepest layer of each stride from 8 to 16; of a plain
    transformer, whose strides are all one, those at a quarter, half and three quarters of its depth. So the most
    specialised features, the deepest, are left out, and the finest, which make four times the patches.
    """
    if len(set(strides)) == 1:
        return sorted({math.ceil(len(strides) * quarter / 4) - 1 for quarter in (1, 2, 3)})
    deepest = {stride: index for index, stride in enumerate(strides)}
    return [index for stride, index in deepest.items() if 8 <= stride <= 16] or list(range(len(strides) - 1))


@torch.no_grad()
def map_shapes(network: nn.Module, height: int, width: int) -> list[torch.Size]:
    """Shapes (1, C, h, w) of a network's maps for an image of height x width pixels, mostly without computing them."""
    state = dict(chain(network.named_parameters(), network.named_buffers()))
    shapes = {key: value.to("meta") for key, value in state.items()}
    try:
        # Tying would leave modules that a model uses twice without their data.
        maps = functional_call(network, shapes, (torch.empty(1, 3, height, width, device="meta"),), tie_weights=False)
    except RuntimeError:  # either the size does not fit, or this model reads values as it runs
        maps = network(torch.zeros(1, 3, height, width, device=next(iter(state.values())).device))
    return [feature.shape for feature in maps]


class StepwiseFeatures(nn.Module):
    """Feature maps at single blocks of a network that is a plain chain of modules.

    timm's ``features_only`` reads whole stages only; the authors read single blocks of EfficientNet-B5. What lies
    beyond the deepest layer is removed from the model. A layer may be a module of the chain, or an ``nn.Sequential``
    container of them.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        steps = list(_steps(model))
        taps = sorted({_last_inside(steps, layer) for layer in layers})
        self.steps = steps[: taps[-1] + 1]
        self.taps = [steps[tap] for tap in taps]
        for step in steps[taps[-1] + 1 :]:
            parent, _, child = step.rpartition(".")
            delattr(model.get_submodule(parent), child)
        for step in self.steps:
            activation = model.get_submodule(step)
            if hasattr(activation, "inplace"):  # it would overwrite the maps of a layer just before it
                activation.inplace = False  # type: ignore[assignment]
        self.model = model.eval()

        height, width = 256, 256
        entries = [
            {"module": tap, "num_chs": shape[1], "reduction": round(height / shape[2])}
            for tap, shape in zip(self.taps, map_shapes(self, height, width), strict=True)
        ]
        self.feature_info = FeatureInfo(entries, tuple(range(len(entries))))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, C, h, w) of images (B, 3, H, W), in the order of their depth."""
        features, maps = images, []
        for step in self.steps:
            features = self.model.get_submodule(step)(features)
            if step in self.taps:
                maps.append(features)
        return maps


def _steps(chain: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the modules of a chain, in the order in which they run."""
    for name, child in chain.named_children():
        if isinstance(child, nn.Sequential):
            yield from _steps(child, f"{prefix}{name}.")
        else:
            yield prefix + name


def _last_inside(steps: Sequence[str], layer: str) -> int:
    """Index of the step whose output is that of the layer: the step itself, or the last one in a container."""
    return max(index for index, step in enumerate(steps) if f"{step}.".startswith(f"{layer}."))


def _create(name: str, image_size: tuple[int, int] | None, **options: Any) -> nn.Module:
    """Call timm with whichever of its options for images of any size, or else of one, the model takes."""
    attempts: list[dict[str, Any]] = [{}]
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        attempts = [{"dynamic_img_size": True}, *([{"img_size": image_size}] if image_size else []), {}]
    if options.get("features_only"):
        # The getter gives channels-first maps whatever the model's own layout, and drops what lies deeper.
        attempts = [{**attempt, "feature_cls": "getter"} for attempt in attempts] + attempts
    try:
        for attempt in attempts[:-1]:
            with suppress(TypeError):  # of an option that this model does not take
                return timm.create_model(name, **attempt, **options)
        return timm.create_model(name, **attempts[-1], **options)
    except (AssertionError, RuntimeError) as error:
        msg = f"backbone {name!r} cannot be built for image_size = {image_size}: {error or type(error).__name__}"
        raise ValueError(msg) from error
