"""Backbones by name, with the weights and layers of the authors' code where there are any."""

import difflib
from dataclasses import dataclass, replace

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

# The weights of the authors' code, under anomalib's names. No timm tag is known to equal the authors' EfficientNet-B5
# file, `efficientnet-b5-b6417697`, the AutoAugment weights that were converted from TensorFlow. Nearest to it is timm's
# own conversion of TensorFlow's AutoAugment weights: the same padding, batch-norm epsilon and training recipe.
PAPER_WEIGHTS = {
    "resnet18": "resnet18.tv_in1k",
    "wide_resnet50_2": "wide_resnet50_2.tv_in1k",
    "vgg19_bn": "vgg19_bn.tv_in1k",
    "efficientnet_b5": "tf_efficientnet_b5.aa_in1k",
}

_VGG19_LAYERS = ("features.25", "features.38", "features.52")
_EFFICIENTNET_B5_LAYERS = (
    *(f"blocks.1.{block}" for block in range(5)),
    *(f"blocks.2.{block}" for block in range(2, 5)),
    "blocks.4.6",
)


@dataclass(frozen=True)
class Backbone:
    """A backbone as the authors' code reads it."""

    name: str  # timm's name, with the tag of its weights
    has_weights: bool  # whether timm has pre-trained weights for it
    layers: tuple[str, ...] | None = None  # that the authors read; None where :func:`default_layers` chooses
    divide_by_channels: bool = False  # whether each level is divided by its number of channels
    width_multiplier: int = 1  # of the descriptor
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN  # of images with channels in [0, 1], as in the weights' training
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    is_of_one_size: bool = False  # whether the network is built for images of one size


def find_backbone(name: str) -> Backbone:
    """Look up a backbone: one of :data:`PAPER_WEIGHTS`, or any timm model, with a tag or with timm's default tag.

    Raises:
        ValueError: If there is no such model or tag; the message lists close names.
    """
    architecture = name.partition(".")[0]
    full_name = PAPER_WEIGHTS.get(name, name)
    try:
        config = timm.get_pretrained_cfg(full_name) if timm.is_model(architecture) else None
    except RuntimeError:  # timm knows the model, but not the tag
        config = None
    if config is None:
        known = [*PAPER_WEIGHTS, *timm.list_models(), *timm.list_pretrained()]
        tags = [other for other in known if other.startswith(f"{architecture}.")]
        close = tags or difflib.get_close_matches(name, dict.fromkeys(known), n=8) or list(PAPER_WEIGHTS)
        msg = f"backbone must be the name of a timm model, but is {name!r}; close names: {', '.join(close)}"
        raise ValueError(msg)

    if "." not in full_name and config.tag:
        full_name = f"{full_name}.{config.tag}"
    found = Backbone(
        full_name,
        bool(config.has_weights),
        mean=tuple(config.mean),
        std=tuple(config.std),
        is_of_one_size=bool(config.fixed_input_size),
    )
    match architecture:
        case "vgg19_bn":
            return replace(found, layers=_VGG19_LAYERS)
        case "efficientnet_b5" | "tf_efficientnet_b5":
            return replace(found, layers=_EFFICIENTNET_B5_LAYERS, divide_by_channels=True, width_multiplier=2)
        case _:
            return found
