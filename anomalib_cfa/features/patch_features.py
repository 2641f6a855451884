"""Patch features: the pooled feature pyramid of a frozen, pre-trained backbone."""

import logging
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_cfa.features.backbones import find_backbone
from anomalib_cfa.features.folding import fold_batch_norms
from anomalib_cfa.features.network import build_network, map_shapes
from anomalib_cfa.features.weights import assign_weights, hub_options, read_weights, unreachable
from anomalib_cfa.hyperparameters import check_hyperparameters, plain

if TYPE_CHECKING:
    from timm.models import FeatureInfo

logger = logging.getLogger(__name__)


class PatchFeatures(nn.Module):
    """Images -> feature pyramid of a frozen backbone, average-pooled (paper, section III-A).

    Each level collects the chosen layers of one stride, and is pooled over 3 x 3 patches with stride 1 and padding 1.
    The backbone's weights never change, and it is in evaluation mode always. Where no compiler follows, what runs is a
    copy of ``network`` without batch norms (:mod:`anomalib_cfa.features.folding`): hooks on it are not called, and a
    state dict is to be loaded into the whole module.

    The constructor needs neither a file nor the network: :meth:`load_weights` gets the pre-trained weights. They are
    part of the state dict, so a module that is restored from one does not need them again.

    The four backbones of the paper go by anomalib's names ``resnet18``, ``wide_resnet50_2``, ``vgg19_bn`` and
    ``efficientnet_b5``, with the weights that the authors used. For EfficientNet-B5 these are timm's
    ``tf_efficientnet_b5.aa_in1k``, the nearest to the authors' file; each of its levels is divided by its number of
    channels, and the descriptor is twice as wide, as in the authors' code. Any other model goes by timm's name.

    Args:
        backbone: One of the four names, or the name of a timm model, with or without the tag of its weights.
        layers: Layers to read, by timm's names (``feature_info``), in any order; of a ResNet, VGG or EfficientNet
            single blocks too, such as ``layer2.0``. Defaults to the deepest layer of each stride from 8 to 16, or
            to three blocks of a plain transformer; of the paper's VGG and EfficientNet to the authors'.
        pre_trained: Whether :meth:`load_weights` loads pre-trained weights. If not, they stay random.
        weights_path: Local file of pre-trained weights, in place of timm's download: see
            :func:`anomalib_cfa.features.weights.read_weights`.
        image_size: Height and width of the images, in pixels. Only models that are built for one size need it.
        seed: Seed of the random weights.

    Raises:
        ValueError: If there is no such backbone or layer, the backbone has no pre-trained weights, or it does not take
            images of image_size.

    Example:
        >>> patch_features = PatchFeatures("resnet18", pre_trained=False)
        >>> [tuple(level.shape) for level in patch_features(torch.rand(1, 3, 64, 96))]
        [(1, 128, 8, 12), (1, 256, 4, 6)]
        >>> patch_features.strides
        (8, 16)
    """

    weights_loaded: Tensor

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        weights_path: str | Path | None = None,
        image_size: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        found = find_backbone(backbone)
        if weights_path is not None and not pre_trained:
            msg = f"weights_path must be None if pre_trained is False, but is {str(weights_path)!r}"
            raise ValueError(msg)
        if pre_trained and weights_path is None and not found.has_weights:
            msg = f"backbone {backbone!r} has no pre-trained weights: give weights_path, or set pre_trained to False"
            raise ValueError(msg)
        check_hyperparameters(layers=plain(layers))

        self.weights_tag = found.name
        self.width_multiplier = found.width_multiplier
        self.divide_by_channels = found.divide_by_channels
        self.pre_trained = pre_trained
        self.weights_path = weights_path
        self.image_size = None if image_size is None else (image_size[0], image_size[1])

        self.requested_layers = tuple(layers) if layers is not None else found.layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_network(self.weights_tag, self.requested_layers, self.image_size)
        info = cast("FeatureInfo", network.feature_info)
        self.layers: tuple[str, ...] = tuple(info.module_name())
        # The layers run from fine to coarse, so those of one stride are neighbours: they make up a level.
        taps = zip(info.reduction(), info.channels(), strict=True)
        levels = {stride: [width for _, width in level] for stride, level in groupby(taps, itemgetter(0))}
        self.strides: tuple[int, ...] = tuple(levels)
        self.channels: tuple[int, ...] = tuple(sum(widths) for widths in levels.values())
        self.layers_per_level: tuple[int, ...] = tuple(len(widths) for widths in levels.values())

        # Convolutions on a CPU are faster with the channels last.
        self.network = network.requires_grad_(False).to(memory_format=torch.channels_last)
        self._folded: list[nn.Module] = []  # what runs in its place: no submodule, since it has no weights of its own
        self.register_buffer("weights_loaded", torch.tensor(False))
        self.eval()
        self._checked_sizes: set[tuple[int, int]] = set()
        if self.image_size is not None:
            self.check_image_size(*self.image_size)

    def train(self, mode: bool = True) -> "PatchFeatures":  # noqa: ARG002
        """Stay in evaluation mode, whatever the mode asked for."""
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": []}

    def _apply(self, *args: Any, **options: Any) -> "PatchFeatures":
        self._folded = []  # its weights would stay on the old device, or of the old type
        moved: PatchFeatures = super()._apply(*args, **options)  # type: ignore[no-untyped-call]
        return moved

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._folded = []
        super()._load_from_state_dict(*args, **options)

    def load_weights(self) -> None:
        """Load the pre-trained weights, unless they are there already or pre_trained is False.

        They come from weights_path if it is given, and otherwise from timm's cache or download.

        Raises:
            FileNotFoundError: If there is no file at weights_path.
            ConnectionError: If the weights are not in the cache and cannot be downloaded.
            ValueError: If the weights do not fit the backbone, or are not finite.
        """
        if not self.pre_trained or self.weights_loaded:
            return
        if self.weights_path is not None:
            source = f"weights_path {str(self.weights_path)!r}"
            weights = read_weights(self.weights_path)
        else:
            source = f"timm's {self.weights_tag!r}"
            weights = self._timm_weights()
        assign_weights(self.network, weights, source)
        self._folded = []
        self.weights_loaded.fill_(True)
        logger.info("Backbone %s: weights loaded from %s", self.weights_tag, source)

    def _timm_weights(self) -> dict[str, Tensor]:
        # A second network: timm adapts a model's published weights only while it builds the model.
        options = hub_options(self.weights_tag)
        with torch.random.fork_rng(devices=[]):
            try:
                twin = build_network(self.weights_tag, self.requested_layers, self.image_size, **options)
            except OSError as error:
                raise unreachable(self.weights_tag, error) from error
        return {key.removeprefix("model."): value for key, value in twin.state_dict().items()}

    def check_image_size(self, height: int, width: int) -> None:
        """Raise a ValueError if images are smaller than the deepest stride, or of a size the model does not take."""
        if (height, width) in self._checked_sizes:
            return
        deepest = self.strides[-1]
        if min(height, width) < deepest:
            msg = (
                f"images must be at least {deepest} pixels a side, the stride of the deepest layer "
                f"{self.layers[-1]!r}, but are {height} x {width}"
            )
            raise ValueError(msg)
        try:
            shapes = map_shapes(self, height, width)
        except (AssertionError, RuntimeError, ValueError) as error:
            msg = (
                f"backbone {self.weights_tag!r}, built with image_size = {self.image_size}, does not take images of "
                f"{height} x {width} pixels: {error or type(error).__name__}"
            )
            raise ValueError(msg) from error
        expected = zip(shapes, self.channels, strict=True)
        if any(len(shape) != 4 or shape[1] != channels or 0 in shape for shape, channels in expected):
            msg = f"backbone {self.weights_tag!r} gives no feature maps for images of {height} x {width} pixels"
            raise ValueError(msg)
        self._checked_sizes.add((height, width))

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """The pyramid of pre-processed images (B, 3, H, W): pooled maps (B, C_l, h_l, w_l), finest first.

        Raises:
            RuntimeError: If the pre-trained weights are not loaded yet.
        """
        maps = iter(self._running(images)(images.contiguous(memory_format=torch.channels_last)))
        pyramid = []
        for layers, channels in zip(self.layers_per_level, self.channels, strict=True):
            level = next(maps) if layers == 1 else torch.cat([next(maps) for _ in range(layers)], dim=1)
            level = F.avg_pool2d(level, kernel_size=3, stride=1, padding=1)
            pyramid.append(level / channels if self.divide_by_channels else level)
        return pyramid

    def _running(self, images: Tensor) -> nn.Module:
        """The network without its batch norms, or as it is where only shapes are asked for or a compiler follows."""
        if images.is_meta or torch.compiler.is_compiling():
            return self.network
        if not self._folded:
            if self.pre_trained and not self.weights_loaded:
                msg = "The backbone has no pre-trained weights yet, and pre_trained is True: call load_weights() first"
                raise RuntimeError(msg)
            self._folded = [fold_batch_norms(self.network).to(memory_format=torch.channels_last)]
        return self._folded[0]
