"""The network of CFA, free of Lightning: images -> patch descriptors -> distances to the memory bank -> anomaly map."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from tqdm.auto import tqdm

from anomalib_cfa.anomaly_map import AnomalyMapGenerator, average_views, central_view, softmin_scores
from anomalib_cfa.bank.builders import BANK_BUILDERS
from anomalib_cfa.bank.calibration import CenterCalibration
from anomalib_cfa.bank.memory_bank import MemoryBank
from anomalib_cfa.descriptor import PatchDescriptor
from anomalib_cfa.features import PatchFeatures
from anomalib_cfa.hyperparameters import check_neighbors
from anomalib_cfa.processes import ALONE, Processes
from anomalib_cfa.whitening import PatchStatistics

logger = logging.getLogger(__name__)

# Of a block's patch descriptors: what a CPU's caches hold, or what an accelerator's memory can spare.
_BLOCK_BYTES = 16 * 2**20
_BLOCK_BYTES_ON_ACCELERATOR = 2**30
_FEWEST_TARGETS = 6  # centres found for each patch, among which the calibration looks for one from another place
_NEIGHBORS = 8  # centres, a centre itself among them, whose patches say what is usual around it


class PatchScores(NamedTuple):
    """Scores of patches, both of shape (B, h, w). They differ only where ``score`` is ``"local"``."""

    of_map: Tensor  # for the anomaly map
    of_image: Tensor  # for the image's score


class Maps(NamedTuple):
    """Smoothed patch scores, both of shape (B, H, W). They differ only where ``score`` is ``"local"``."""

    shown: Tensor  # the anomaly map
    of_image: Tensor  # its maximum is the image's score

    def predictions(self) -> InferenceBatch:
        """Anomaly maps, and image scores of shape (B,)."""
        return InferenceBatch(pred_score=self.of_image.amax(dim=(-2, -1)), anomaly_map=self.shown)


class CfaModel(nn.Module):
    """CFA: a frozen backbone, a learned patch descriptor and a memory bank of fixed size (arXiv 2206.04325).

    Args:
        patch_features: What gives the pooled features, a frozen backbone.
        **others: Those of :class:`anomalib_cfa.Cfa`, which checks them.

    Example:
        Features from anywhere fit a memory bank:

        >>> model = CfaModel(PatchFeatures("resnet18", pre_trained=False)).eval()
        >>> model.fit([model.pyramid(torch.rand(4, 3, 64, 64))])
        >>> model(torch.rand(1, 3, 64, 64)).anomaly_map.shape
        torch.Size([1, 64, 64])
    """

    def __init__(
        self,
        patch_features: PatchFeatures,
        gamma_c: float | None = None,
        gamma_d: int = 1,
        num_nearest_neighbors: int = 3,
        num_hard_negative_features: int = 3,
        radius: float = 1e-5,
        learn_radius: bool = True,
        bank: str = "kmeans",
        whitening: float | None = 0.5,
        search: str = "two_level",
        score: str = "local",
        sigma: float = 4.0,
        center_view: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.gamma_c = gamma_c
        self.num_nearest_neighbors = num_nearest_neighbors
        self.num_hard_negative_features = num_hard_negative_features
        self.bank = bank
        self.whitening = whitening
        self.score = score
        self.center_view = center_view
        self.seed = seed

        self.patch_features = patch_features
        channels = patch_features.width_multiplier * sum(patch_features.channels)
        if gamma_d > channels:
            msg = f"gamma_d must be at most {channels}, the number of channels of the chosen layers, but is {gamma_d}"
            raise ValueError(msg)
        self.descriptor = PatchDescriptor(patch_features.channels, channels // gamma_d, seed)
        self.memory_bank = MemoryBank(search)
        self.calibration = CenterCalibration()
        self.initial_radius = float(radius)
        self.radius = nn.Parameter(torch.tensor(self.initial_radius), requires_grad=learn_radius)
        self.anomaly_map_generator = AnomalyMapGenerator(sigma)

    # Images -> patch descriptors.

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Extract what the patch descriptor reads of pre-processed images of shape (B, 3, H, W).

        Returns:
            The pyramid: pooled feature maps of shape (B, C_l, h_l, w_l), finest first.

        Raises:
            ValueError: If the images are too small for the backbone or for the anomaly map's smoothing.
        """
        if not torch.compiler.is_exporting():
            self._check_view(*images.shape[-2:])
            images = images.as_subclass(Tensor)  # no image of torchvision's, which compilers do not follow
        pyramid: list[Tensor] = self.patch_features(images)
        return pyramid

    def describe(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Describe the patches of a pyramid, by descriptors of shape (B, h, w, D)."""
        descriptors: Tensor = self.descriptor(pyramid)
        return descriptors

    def blocks(self, pyramid: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Split a batch into blocks of as many images as are fast to describe at a time, one at least."""
        finest = pyramid[0]
        held = _BLOCK_BYTES if finest.device.type == "cpu" else _BLOCK_BYTES_ON_ACCELERATOR
        images = max(1, held // (4 * self.descriptor.width * finest.shape[-2] * finest.shape[-1]))
        return map(list, zip(*(level.split(images) for level in pyramid), strict=True))

    def check_image_size(self, height: int, width: int) -> None:
        """Check, before the long work, that all views of images of height x width pixels can be scored.

        Raises:
            ValueError: If they are too small for the backbone or for the anomaly map's smoothing, or of a size that the
                backbone does not take.
        """
        self._check_view(height, width)
        if self.center_view:
            try:
                self._check_view(*central_view(torch.empty(height, width, device="meta")).shape)
            except ValueError as error:
                msg = f"center_view must be False for images of {height} x {width} pixels: of their centre, {error}"
                raise ValueError(msg) from error

    def _check_view(self, height: int, width: int) -> None:
        self.patch_features.check_image_size(height, width)
        smallest = self.anomaly_map_generator.min_image_size
        if min(height, width) < smallest:
            msg = f"images must be at least {smallest} pixels a side, but are {height} x {width}"
            raise ValueError(msg)

    # Patch descriptors -> memory bank and calibration.

    def fit(self, pyramids: Iterable[Sequence[Tensor]], processes: Processes = ALONE) -> None:
        """Build the memory bank and calibrate the score, for use without training.

        Arguments and errors are those of :meth:`build`.
        """
        self.build(pyramids, processes)
        self.calibrate_all(pyramids, processes)

    @torch.no_grad()
    def build(self, pyramids: Iterable[Sequence[Tensor]], processes: Processes = ALONE) -> None:
        """Start the descriptor and build the memory bank with it: all that precedes training.

        All processes end with the same, bit for bit.

        Args:
            pyramids: Batches of normal images, as :meth:`pyramid` gives them; walked over several times. Each process
                has its own share of them.
            processes: Those that share the images. Default: this one alone.

        Raises:
            TypeError: If the batches can be walked over once only.
            ValueError: If there is no image, the images differ in size, or the bank would have fewer than K + J
                centres.
        """
        if iter(pyramids) is pyramids:
            msg = f"pyramids must be walked over several times, as a list can be, but is a {type(pyramids).__name__}"
            raise TypeError(msg)
        if self.whitening is not None:
            statistics = PatchStatistics()
            for block in self._all_blocks(pyramids, processes, "Reading patch features"):
                statistics.update(block)
            mean, covariance = map(processes.broadcast, statistics.moments(processes))
            self.descriptor.start_whitened(mean, covariance, self.seed, self.whitening)

        builder = BANK_BUILDERS[self.bank](self.gamma_c, self.seed, processes)
        for block in self._all_blocks(pyramids, processes, "Building the memory bank"):
            builder.update(self.describe(block))
        centers, sources = builder.centers()
        check_neighbors(len(centers), self.num_nearest_neighbors, self.num_hard_negative_features)
        # K-means need not round alike on all machines.
        self.assign_bank(processes.broadcast(centers), sources if sources is None else processes.broadcast(sources))
        logger.info("Built the memory bank: %d centres from %d images", len(centers), builder.count)

    @torch.no_grad()
    def calibrate_all(self, pyramids: Iterable[Sequence[Tensor]], processes: Processes = ALONE) -> None:
        """Calibrate the score with the descriptor as it is, which an epoch of training does on its way."""
        self.calibration.restart()
        for block in self._all_blocks(pyramids, processes, "Calibrating the score"):
            squared, indices, _ = self.targets(block)
            self.calibrate(squared, indices)
        self.finish_calibration(processes)

    def _all_blocks(
        self, pyramids: Iterable[Sequence[Tensor]], processes: Processes, task: str
    ) -> Iterator[list[Tensor]]:
        for pyramid in tqdm(pyramids, task, disable=processes.rank != 0, leave=False):
            self._check_patches(pyramid)
            yield from self.blocks(pyramid)

    def _check_patches(self, pyramid: Sequence[Tensor]) -> None:
        """Check at the first images, before the long work, that a bank of a given gamma_c would be large enough."""
        if self.gamma_c is not None:
            patches = pyramid[0].shape[-2] * pyramid[0].shape[-1]
            check_neighbors(int(patches / self.gamma_c), self.num_nearest_neighbors, self.num_hard_negative_features)

    def assign_bank(self, centers: Tensor, sources: Tensor | None = None) -> None:
        """Set the memory bank's centres, of shape (N, D), and their sources; their calibration starts anew."""
        self.memory_bank.assign(centers.to(self.descriptor.weight), sources)
        self.calibration.reset(len(centers))

    def targets(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Find the targets of attraction and repulsion: each patch's K + J nearest centres.

        Returns:
            Squared distances and indices of these centres, and never of fewer than six if there are as many, as
            :meth:`~anomalib_cfa.bank.memory_bank.MemoryBank.nearest` gives them; and the patch descriptors, of shape
            (B, h, w, D).
        """
        descriptors = self.describe(pyramid)
        wanted = max(self.num_nearest_neighbors + self.num_hard_negative_features, _FEWEST_TARGETS)
        neighbors = min(wanted, len(self.memory_bank.centers))
        return *self.memory_bank.nearest(descriptors, neighbors), descriptors

    def calibrate(self, squared: Tensor, indices: Tensor) -> None:
        """Take in what is usual for normal patches, whose nearest centres are given as by :meth:`targets`.

        A patch of which a centre was made lies nearer to it than a new one does, and, where images are aligned, so do
        the patches of the same place in all images. Each therefore counts by its nearest centre from another place;
        where none of those given is, by the last.
        """
        squared, indices = self.memory_bank.nearest_elsewhere(squared, indices)
        self.calibration.update(squared.sqrt(), indices)

    def finish_calibration(self, processes: Processes) -> None:
        """Relate scores to the distances that the calibration has taken in, in all processes."""
        neighbors = None
        if self.score == "local" and self.memory_bank.is_built:
            neighbors = self.memory_bank.index.neighbors(min(_NEIGHBORS, len(self.memory_bank.centers)))
        self.calibration.finish(neighbors, processes.sum)

    def trained_parameters(self) -> list[Tensor]:
        """What training changes: the patch descriptor and, if it is learned, the radius."""
        return [parameter for parameter in (*self.descriptor.parameters(), self.radius) if parameter.requires_grad]

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all that was learned: descriptor, radius, memory bank and calibration."""
        self.descriptor.reset(self.seed)
        self.radius.fill_(self.initial_radius)
        self.memory_bank.clear()
        self.calibration.reset(0)

    # Images -> predictions.

    def forward(self, images: Tensor) -> InferenceBatch:
        """Predict.

        Args:
            images: Pre-processed images of shape (B, 3, H, W).

        Returns:
            The anomaly maps, of shape (B, H, W), and the image scores, of shape (B,): the maxima of the maps, or, where
            ``score`` is ``"local"``, of maps of calibrated distances that are not shown.

        Raises:
            RuntimeError: If the memory bank is not built yet.
            ValueError: If the images are too small, or lead to nan or infinite distances.
        """
        if not self.memory_bank.is_built:
            msg = "The memory bank is not built yet: fit the model, or load a checkpoint of a fitted one"
            raise RuntimeError(msg)
        maps = self._maps(images)
        if self.center_view:
            maps = Maps(*map(average_views, maps, self._maps(central_view(images))))
        return maps.predictions()

    def _maps(self, images: Tensor) -> Maps:
        return self.smooth(self.patch_scores(self.pyramid(images)), images.shape[-2:])

    def patch_scores(self, pyramid: Sequence[Tensor]) -> PatchScores:
        """Score each patch.

        Raises:
            ValueError: If a distance is not finite.
        """
        if torch.compiler.is_exporting():
            return self._block_scores(pyramid)
        scores = PatchScores(*map(torch.cat, zip(*map(self._block_scores, self.blocks(pyramid)), strict=True)))
        if not torch.isfinite(scores.of_map).all():
            msg = "The images must hold finite values only, but lead to nan or infinite distances"
            raise ValueError(msg)
        return scores

    def _block_scores(self, pyramid: Sequence[Tensor]) -> PatchScores:
        return self.score_distances(*self.memory_bank.nearest(self.describe(pyramid).detach(), self.scored_neighbors))

    @property
    def scored_neighbors(self) -> int:
        """How many of a patch's nearest centres its score depends on."""
        return self.num_nearest_neighbors if self.score == "softmin" else 1

    def score_distances(self, squared: Tensor, indices: Tensor) -> PatchScores:
        """Score patches as :meth:`patch_scores` does, by what the bank finds for :attr:`scored_neighbors` centres."""
        distances = squared.sqrt()
        # Flattened, not indexed: see anomalib_cfa.export.openvino.
        nearest: Tensor = softmin_scores(distances) if self.score == "softmin" else distances.flatten(2)
        if self.score in {"softmin", "nearest"}:
            return PatchScores(nearest, nearest)
        calibrated: Tensor = self.calibration(nearest, indices[..., 0])
        return PatchScores(nearest if self.score == "local" else calibrated, calibrated)

    def smooth(self, patch_scores: PatchScores, image_size: Sequence[int]) -> Maps:
        """Bring patch scores to the image's size, height x width, and smooth them."""
        height, width = image_size
        shown = self.anomaly_map_generator(patch_scores.of_map, (height, width))
        if self.score != "local":
            return Maps(shown, shown)
        return Maps(shown, self.anomaly_map_generator(patch_scores.of_image, (height, width)))
