"""The ways to build the memory bank in one pass over the normal images, with the descriptor as it starts."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from anomalib_cfa.bank.k_means import k_means
from anomalib_cfa.bank.sample import PatchSample
from anomalib_cfa.bank.search import CenterIndex
from anomalib_cfa.processes import ALONE, Processes

_CENTERS = 16384  # if gamma_c is not given
_PATCHES_PER_CENTER = 8  # in the sample for K-means
_FEWEST_PATCHES_PER_CENTER = 2  # with fewer images there are fewer centres


class BankBuilder(ABC):
    """Compresses the patch descriptors of any number of images into N centres.

    Args:
        gamma_c: There are N = T / gamma_c centres, T being the patches of an image. None: each kind's own number.
        seed: Governs K-means.
        processes: Those that share the images.
    """

    def __init__(self, gamma_c: float | None, seed: int, processes: Processes = ALONE) -> None:
        self.gamma_c = gamma_c
        self.seed = seed
        self.processes = processes
        self.count = 0
        self.state: Tensor | None = None
        self._size: torch.Size | None = None

    def update(self, descriptors: Tensor) -> None:
        """Take in the patch descriptors of some images, of shape (B, h, w, D).

        Raises:
            ValueError: If these images have another number of patches than those before.
        """
        size = descriptors.shape[1:3]
        if self._size is not None and size != self._size:
            height, width = self._size
            msg = (
                f"All normal images must have one size after the pre-processor, but one has {size[0]} x {size[1]} "
                f"patches and those before it have {height} x {width}; give the pre-processor a Resize to a fixed size"
            )
            raise ValueError(msg)
        self._size = size
        self._update(descriptors)

    @abstractmethod
    def _update(self, descriptors: Tensor) -> None:
        """Take in the patch descriptors of some images, of shape (B, h, w, D)."""

    @abstractmethod
    def centers(self) -> tuple[Tensor, Tensor | None]:
        """Centres of all processes' images, of shape (N, D), and where each came from, of shape (N, 3), if known."""

    def _compressed(self, patches: int) -> int:
        """How many centres so many patches of an image are compressed to."""
        return int(patches / (self.gamma_c or 1))


class KMeansBank(BankBuilder):
    """Centres of K-means over a random sample of all images' patch descriptors.

    Unlike a mean of each position it does not need the images to be aligned. Without a gamma_c there are 16,384
    centres, or as many as there are pairs of patches. Where there are no more than two patches for a centre, the
    centres are a random choice of them.
    """

    _sample: PatchSample | None = None
    _patches = 0  # of an image

    def _update(self, descriptors: Tensor) -> None:
        batch, height, width, _ = descriptors.shape
        self._patches = height * width
        if self._sample is None:
            wanted = _CENTERS if self.gamma_c is None else max(self._compressed(self._patches), 1)
            self._sample = PatchSample(_PATCHES_PER_CENTER * wanted, self.seed, self.processes)
        self._sample.update(descriptors)
        self.count += batch

    def centers(self) -> tuple[Tensor, Tensor | None]:
        """The centres of K-means, and of each the patch that is nearest to it."""
        assert self._sample is not None
        self.count = int(self.processes.sum(torch.tensor(self.count, device=self._sample.device)))
        points, sources = self._sample.gathered()
        if self.gamma_c is None:
            wanted = min(_CENTERS, self.count * self._patches // _FEWEST_PATCHES_PER_CENTER)
        else:
            wanted = self._compressed(self._patches)
        if len(points) <= _FEWEST_PATCHES_PER_CENTER * wanted:
            # The mean of two patches is as near to one as to the other: rounding would choose where it came from.
            chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(self.seed))[:wanted]
            chosen = chosen.sort().values.to(points.device)
            return points[chosen], sources[chosen]
        centers, nearest = k_means(points, wanted, self.seed)
        return centers, sources[nearest]


class MeanBank(BankBuilder):
    """The authors' code's bank: the mean over all images of each position's descriptor.

    K-means compresses the T means to N centres where gamma_c is above 1.
    """

    def _update(self, descriptors: Tensor) -> None:
        summed = descriptors.flatten(1, 2).double().sum(dim=0)
        self.state = summed if self.state is None else self.state + summed
        self.count += len(descriptors)

    def centers(self) -> tuple[Tensor, Tensor | None]:
        """The means of all images, exact however uneven the processes' shares."""
        assert self.state is not None
        self.count = int(self.processes.sum(torch.tensor(self.count, device=self.state.device)))
        means = (self.processes.sum(self.state) / self.count).float()
        clusters = self._compressed(len(means))
        return (means if clusters == len(means) else k_means(means, clusters, self.seed)[0]), None


class EmaBank(BankBuilder):
    """The paper's bank: centres of the first image, each pulled towards its nearest neighbour in every further image.

    C_0 is K-means over the first image's T descriptors (the descriptors themselves where gamma_c is 1); for image i
    every centre moves to (1 - beta) c + beta c_nn (paper, section III-B), with a beta of 1 / i, which weighs all images
    alike.

    Several processes start from the first process's C_0, and their centres are averaged, weighted by the images that
    each took in. As all weigh alike, that loses nothing but the order.
    """

    def _update(self, descriptors: Tensor) -> None:
        for image in descriptors.flatten(1, 2).float():
            starts = self.state is None
            if self.state is None:
                clusters = self._compressed(len(image))
                start = image if clusters == len(image) else k_means(image, clusters, self.seed)[0]
                self.state = self.processes.broadcast(start).to(image.device)
            if not (starts and self.processes.rank == 0):
                nearest = CenterIndex(image, "exact")(self.state[None, None], k=1)[1].flatten()
                # Weight 1 / 1 for the first image here, if the start was another process's: it counts only there.
                self.state = torch.lerp(self.state, image[nearest], 1 / (self.count + 1))
            self.count += 1

    def centers(self) -> tuple[Tensor, Tensor | None]:
        """The centres, averaged over all processes."""
        assert self.state is not None
        images = int(self.processes.sum(torch.tensor(self.count, device=self.state.device)))
        self.state = (self.processes.sum(self.state.double() * self.count) / images).float()
        self.count = images
        return self.state, None


BANK_BUILDERS: dict[str, type[BankBuilder]] = {"kmeans": KMeansBank, "mean": MeanBank, "ema": EmaBank}
