"""The ways to build the memory bank in one pass over the normal images, with the descriptor as it starts."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import faiss
import numpy as np
import torch
from torch import Tensor

from anomalib_cfa.bank.search import nearest_centers

BANK_KINDS = ("kmeans", "mean", "ema")

_POINTS_PER_CENTER = 32
# Of ten, the later ones lower the inertia by a few per cent, and move no figure of `benchmarks/ablation.py`.
_ITERATIONS = 4


class BankBuilder(ABC):
    """Compresses the patch descriptors of any number of images into N = T / gamma_c centres.

    Args:
        gamma_c: By how much the T patches of an image are compressed.
        seed: Governs K-means.
    """

    def __init__(self, gamma_c: float, seed: int) -> None:
        self.gamma_c = gamma_c
        self.seed = seed
        self.count = 0
        self.state: Tensor | None = None
        self._patches: int | None = None

    def update(self, descriptors: Tensor) -> None:
        """Take in some images.

        Args:
            descriptors: Their patch descriptors of shape (B, T, D).

        Raises:
            ValueError: If these images have another number of patches than those before.
        """
        if self._patches not in (None, descriptors.shape[1]):
            msg = (
                f"All normal images must have one size after the pre-processor, but one has {descriptors.shape[1]} "
                f"patches and those before it have {self._patches}; give the pre-processor a Resize to a fixed size"
            )
            raise ValueError(msg)
        self._patches = descriptors.shape[1]
        self._update(descriptors)

    @abstractmethod
    def _update(self, descriptors: Tensor) -> None:
        """Take in the patch descriptors of some images, of shape (B, T, D)."""

    @abstractmethod
    def centers(self) -> Tensor:
        """The centres of all images taken in, of shape (N, D)."""

    @abstractmethod
    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Combine with the builders of the other processes, which took in other images.

        Args:
            total: Sums a tensor over all processes.
        """


class KMeansBank(BankBuilder):
    """Centres of K-means over a random sample of all images' patch descriptors.

    Unlike a mean of each position it does not need the images to be aligned.

    The sample is at most 32 patches a centre however many images there are: whenever it is full, a random half of it is
    dropped, and half as many patches of each further image are taken in, so that all images count alike.

    Args:
        gamma_c: By how much the T patches of an image are compressed; below 1 there are more centres than T.
        seed: Governs the sample and K-means.
        processes: How many processes share the images.
        process: Which of them this is, from 0.
    """

    def __init__(self, gamma_c: float, seed: int, processes: int = 1, process: int = 0) -> None:
        super().__init__(gamma_c, seed)
        self.processes = processes
        self.process = process
        self.share = 1.0
        self.clusters = 0
        self._new: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(seed + process)

    def _update(self, descriptors: Tensor) -> None:
        patches = descriptors.shape[1]
        self.clusters = int(patches / self.gamma_c)
        capacity = max(_POINTS_PER_CENTER * self.clusters // self.processes, self.clusters, 1)
        held = sum(map(len, self._new)) + (0 if self.state is None else len(self.state))
        for image in descriptors.float():
            self._new.append(self._sample(image, max(1, int(self.share * patches))))
            self.count += 1
            held += len(self._new[-1])
            if held > capacity:
                state = self._gather()
                while len(state) > capacity:
                    state = self._sample(state, len(state) // 2)
                    self.share /= 2
                self.state, held = state, len(state)

    def _gather(self) -> Tensor:
        """The whole sample in one tensor; put together only when it must be, since that copies it."""
        self.state = torch.cat(self._new if self.state is None else [self.state, *self._new])
        self._new = []
        return self.state

    def _sample(self, points: Tensor, count: int) -> Tensor:
        return points[torch.randperm(len(points), generator=self._generator)[:count].to(points.device)]

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Put the samples of all processes together."""
        state = self._gather()
        points, width = state.shape
        counts = torch.zeros(self.processes, dtype=torch.int64, device=state.device)
        counts[self.process] = points
        sizes = total(counts).tolist()
        own = state.new_zeros(sum(sizes), width)
        start = sum(sizes[: self.process])
        own[start : start + points] = state
        self.state = total(own)
        self.count = int(total(torch.tensor(self.count, device=own.device)))

    def centers(self) -> Tensor:
        """The centres of all images taken in, of shape (N, D)."""
        sample = self._gather()
        return k_means(sample, min(self.clusters, len(sample)), self.seed)


class MeanBank(BankBuilder):
    """The authors' code's bank: the mean over all images of each position's descriptor.

    K-means compresses the T means to N centres when gamma_c > 1.
    """

    def _update(self, descriptors: Tensor) -> None:
        summed = descriptors.double().sum(dim=0)
        self.state = summed if self.state is None else self.state + summed
        self.count += len(descriptors)

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Sum over all processes: exact, however uneven their shares."""
        assert self.state is not None
        self.count = int(total(torch.tensor(self.count, device=self.state.device)))
        self.state = total(self.state)

    def centers(self) -> Tensor:
        """The centres of all images taken in, of shape (N, D)."""
        assert self.state is not None
        means = (self.state / self.count).float()
        return means if self.gamma_c == 1 else k_means(means, int(len(means) / self.gamma_c), self.seed)


class EmaBank(BankBuilder):
    """The paper's bank: centres of the first image, each pulled towards its nearest neighbour in every further image.

    C_0 is K-means over the first image's T descriptors (the descriptors themselves when gamma_c = 1); for image i
    every centre moves to (1 - beta) c + beta c_nn (paper, section III-B).

    Several processes start from the first process's C_0, and their centres are averaged, weighted by the images that
    each took in. With beta = 1/i, for which an EMA is an equal-weight mean, that loses nothing but the order.

    Args:
        gamma_c: By how much the T patches of an image are compressed.
        seed: Governs K-means.
        beta: Weight of the newest image. None: 1/i, which weighs all images alike.
        broadcast: Hands the first process's tensor to all.
        is_first: Whether this is the first process, whose first image makes C_0.
    """

    def __init__(
        self,
        gamma_c: float,
        seed: int,
        beta: float | None = None,
        broadcast: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        is_first: bool = True,
    ) -> None:
        super().__init__(gamma_c, seed)
        self.beta = beta
        self.broadcast = broadcast
        self.is_first = is_first

    def _update(self, descriptors: Tensor) -> None:
        for image in descriptors.float():
            starts = self.state is None
            if self.state is None:
                start = image if self.gamma_c == 1 else k_means(image, int(len(image) / self.gamma_c), self.seed)
                self.state = self.broadcast(start).to(image.device)
            if not (starts and self.is_first):
                nearest = image[nearest_centers(self.state, image, k=1)[1].squeeze(1)]
                # 1 / 1 in a process that was handed its start: that counts in the process that made it.
                self.state = torch.lerp(self.state, nearest, self.beta or 1 / (self.count + 1))
            self.count += 1

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Average over all processes, weighted by the images that each took in."""
        assert self.state is not None
        images = int(total(torch.tensor(self.count, device=self.state.device)))
        self.state = (total(self.state.double() * self.count) / images).float()
        self.count = images

    def centers(self) -> Tensor:
        """The centres of all images taken in, of shape (N, D)."""
        assert self.state is not None
        return self.state


def k_means(points: Tensor, clusters: int, seed: int) -> Tensor:
    """K-means by FAISS.

    Args:
        points: Points of shape (P, D).
        clusters: How many centres, at most P.
        seed: Chooses the initial centres.

    Returns:
        Centres of shape (clusters, D), on the points' device.
    """
    vectors = np.ascontiguousarray(points.detach().float().cpu().numpy())
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        clusters,
        niter=_ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(vectors),
    )
    kmeans.train(vectors)
    return torch.from_numpy(kmeans.centroids).to(points.device)
