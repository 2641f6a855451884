"""The network of CFA, free of Lightning: images -> patch descriptors -> distances to the memory bank -> anomaly map."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_cfa.anomaly_map import AnomalyMapGenerator, softmin_scores
from anomalib_cfa.bank.builders import BankBuilder, EmaBank, KMeansBank, MeanBank
from anomalib_cfa.bank.calibration import CenterCalibration
from anomalib_cfa.bank.folded_bank import FoldedBank
from anomalib_cfa.bank.memory_bank import MemoryBank
from anomalib_cfa.descriptor import PatchDescriptor
from anomalib_cfa.features.patch_features import PatchFeatures
from anomalib_cfa.views import average_views, central_view

# Of a block's patch descriptors: what a CPU's caches hold, or what an accelerator's memory can spare.
_BLOCK_BYTES = 16 * 2**20
_BLOCK_BYTES_ON_ACCELERATOR = 2**30


class CfaModel(nn.Module):
    """CFA: a frozen backbone, a learned patch descriptor and a memory bank of fixed size (arXiv 2206.04325).

    The arguments are those of :class:`anomalib_cfa.Cfa`, which checks them.

    Example:
        >>> model = CfaModel("resnet18", pre_trained=False).eval()
        >>> builder = model.bank_builder()
        >>> builder.update(model.describe(model.patch_features(torch.rand(4, 3, 64, 64))).flatten(1, 2))
        >>> model.assign_bank(builder.centers())
        >>> model(torch.rand(1, 3, 64, 64)).anomaly_map.shape
        torch.Size([1, 64, 64])
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        weights_path: str | Path | None = None,
        image_size: tuple[int, int] | None = None,
        gamma_c: float = 1,
        gamma_d: int = 1,
        num_nearest_neighbors: int = 3,
        num_hard_negative_features: int = 3,
        radius: float = 1e-5,
        learn_radius: bool = True,
        bank: str = "kmeans",
        beta: float | None = None,
        search: str = "ivf",
        score: str = "calibrated",
        sigma: float = 4.0,
        center_view: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.gamma_c = gamma_c
        self.num_nearest_neighbors = num_nearest_neighbors
        self.num_hard_negative_features = num_hard_negative_features
        self.bank = bank
        self.beta = beta
        self.score = score
        self.center_view = center_view
        self.seed = seed

        self.patch_features = PatchFeatures(backbone, layers, pre_trained, weights_path, image_size, seed)
        width = self.patch_features.width_multiplier * sum(self.patch_features.channels) // gamma_d
        self.descriptor = PatchDescriptor(self.patch_features.channels, width, seed)
        self.memory_bank = MemoryBank(search)
        self.calibration = CenterCalibration()
        self.radius = nn.Parameter(torch.tensor(float(radius)), requires_grad=learn_radius)
        self.anomaly_map_generator = AnomalyMapGenerator(sigma)
        self._folded_bank: FoldedBank | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded_bank": None}

    def train(self, mode: bool = True) -> "CfaModel":
        """Go to training mode, or to evaluation mode."""
        if mode:
            self._folded_bank = None
        return super().train(mode)

    def bank_builder(
        self, broadcast: Callable[[Tensor], Tensor] = lambda tensor: tensor, processes: int = 1, process: int = 0
    ) -> BankBuilder:
        """A builder of this model's kind of memory bank, to be fed all normal images.

        Args:
            broadcast: Hands the first process's tensor to all, where there are several.
            processes: How many there are.
            process: Which of them this is, from 0.
        """
        if self.bank == "kmeans":
            return KMeansBank(self.gamma_c, self.seed, processes, process)
        if self.bank == "ema":
            return EmaBank(self.gamma_c, self.seed, self.beta, broadcast, is_first=process == 0)
        return MeanBank(self.gamma_c, self.seed)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Extract what the patch descriptor reads.

        Args:
            images: Pre-processed images of shape (B, 3, H, W).

        Returns:
            Pooled feature maps of shape (B, C_l, h_l, w_l), finest first.

        Raises:
            ValueError: If the images are too small for the backbone or for the anomaly map's smoothing.
        """
        height, width = images.shape[-2:]
        self.patch_features.check_image_size(height, width)
        smallest = self.anomaly_map_generator.min_image_size
        if min(height, width) < smallest:
            msg = f"images must be at least {smallest} pixels a side, but are {height} x {width}"
            raise ValueError(msg)
        pyramid: list[Tensor] = self.patch_features(images)
        return pyramid

    def describe(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Describe the patches of an image.

        Args:
            pyramid: Pooled feature maps of shape (B, C_l, h_l, w_l), finest first.

        Returns:
            Patch descriptors of shape (B, h, w, D).
        """
        descriptors: Tensor = self.descriptor(pyramid)
        return descriptors

    def trained_parameters(self) -> list[Tensor]:
        """What training changes: the patch descriptor and, if it is learned, the radius."""
        return [parameter for parameter in (*self.descriptor.parameters(), self.radius) if parameter.requires_grad]

    def blocks(self, pyramid: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Split a batch into blocks of as many images as are fast to describe at a time, one at least.

        Args:
            pyramid: Pooled feature maps of shape (B, C_l, h_l, w_l), finest first.

        Yields:
            The same of some of the images.
        """
        finest = pyramid[0]
        held = _BLOCK_BYTES if finest.device.type == "cpu" else _BLOCK_BYTES_ON_ACCELERATOR
        images = max(1, held // (4 * self.descriptor.width * finest.shape[-2] * finest.shape[-1]))
        return map(list, zip(*(level.split(images) for level in pyramid), strict=True))

    def targets(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Find the targets of attraction and repulsion: each patch's K + J nearest centres.

        Args:
            pyramid: Pooled feature maps of shape (B, C_l, h_l, w_l), finest first.

        Returns:
            Squared distances, nearest first, and the centres' indices, both of shape (B, h, w, K + J).
        """
        return self.memory_bank.nearest(
            self.describe(pyramid), self.num_nearest_neighbors + self.num_hard_negative_features
        )

    def assign_bank(self, centers: Tensor) -> None:
        """Set the memory bank's centres, of shape (N, D); their calibration starts anew."""
        self.memory_bank.assign(centers)
        self.calibration.reset(len(centers))

    def patch_scores(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Score each patch.

        Args:
            pyramid: Pooled feature maps of shape (B, C_l, h_l, w_l), finest first.

        Returns:
            Scores of shape (B, h, w).

        Raises:
            ValueError: If a distance is not finite.
        """
        scores = torch.cat([self._block_scores(block) for block in self.blocks(pyramid)])
        if not torch.isfinite(scores).all():
            msg = "The images must hold finite values only, but lead to nan or infinite distances"
            raise ValueError(msg)
        return scores

    def _block_scores(self, pyramid: Sequence[Tensor]) -> Tensor:
        neighbors = self.num_nearest_neighbors if self.score == "softmin" else 1
        squared, indices = self._folded().nearest(pyramid, neighbors)
        distances = squared.sqrt()
        if self.score == "softmin":
            return softmin_scores(distances)
        if self.score == "calibrated":
            calibrated: Tensor = self.calibration(distances[..., 0], indices[..., 0])
            return calibrated
        return distances[..., 0]

    def _folded(self) -> FoldedBank:
        """The bank for the descriptor at rest, made anew where they are no longer what it was made of."""
        folded, centers = self._folded_bank, self.memory_bank.centers
        if folded is None or not folded.is_of(self.descriptor, centers):
            # Made aside and then put in place whole: several threads may arrive here at once.
            folded = self._folded_bank = FoldedBank(self.descriptor, centers)
        return folded

    def forward(self, images: Tensor) -> Tensor | InferenceBatch:
        """Distances in training, predictions otherwise.

        Args:
            images: Pre-processed images of shape (B, 3, H, W).

        Returns:
            In training mode the squared distances of :meth:`targets`. In evaluation mode a batch with the anomaly maps,
            of shape (B, H, W), and the image scores, their maxima, of shape (B,).

        Raises:
            RuntimeError: If the memory bank is not built yet.
            ValueError: If the images are too small, or lead to nan or infinite distances.
        """
        if not self.memory_bank.is_built:
            msg = "The memory bank is not built yet: fit the model, or load a checkpoint of a fitted one"
            raise RuntimeError(msg)
        if self.training:
            return self.targets(self.pyramid(images))[0]
        anomaly_map = self._anomaly_map(images)
        if self.center_view:
            anomaly_map = average_views(anomaly_map, self._anomaly_map(central_view(images)))
        return InferenceBatch(pred_score=anomaly_map.amax(dim=(-2, -1)), anomaly_map=anomaly_map)

    def _anomaly_map(self, images: Tensor) -> Tensor:
        scores = self.patch_scores(self.pyramid(images))
        anomaly_map: Tensor = self.anomaly_map_generator(scores, images.shape[-2:]).squeeze(1)
        return anomaly_map
