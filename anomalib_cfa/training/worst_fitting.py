"""Which training images fit the others worst: where users' normal images are not all normal, those are the first."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from anomalib_cfa.bank.distances import block_rows
from anomalib_cfa.torch_model import CfaModel
from anomalib_cfa.training.processes import Processes

logger = logging.getLogger(__name__)

WorstFitting = list[tuple[str, float]]
"""Paths of training images and their scores, the worst first."""

_FEWEST_IMAGES = 8  # of which it can be said what is usual
_MOST_NAMED = 5
_MAD_OF_NORMAL = 1.4826  # median absolute deviations make a standard deviation of normally distributed values
_DEVIATIONS = 5.0
_NOBODY, _UNKNOWN = -1, -2  # in the place of an image: a centre that is nobody's own, an image that is not listed
_LEAST_DEVIATION = 1e-3  # of the median: where images are copies of each other, rounding does not count


def stand_out(scores: Tensor) -> Tensor:
    """Say which scores are far above the rest, however many of the rest are odd themselves, up to half.

    They lie more than five deviations above the median, a deviation being 1.4826 median absolute deviations.

    Args:
        scores: Of shape (n,), finite.

    Returns:
        The indices of five at most, the largest score first; none where there are fewer than eight scores.

    Example:
        >>> stand_out(torch.tensor([3.0, 1.0, 2.0, 9.0, 2.0, 1.0, 3.0, 2.0, 20.0])).tolist()
        [8]
    """
    if len(scores) < _FEWEST_IMAGES:
        return torch.empty(0, dtype=torch.int64)
    median = scores.median()
    deviation = _MAD_OF_NORMAL * (scores - median).abs().median()
    limit = median + _DEVIATIONS * torch.maximum(deviation, _LEAST_DEVIATION * median.abs())
    values, order = scores.topk(min(_MOST_NAMED, len(scores)))
    return order[values > limit]


class TrainingScores:
    """Scores the training images as they pass, each by what the memory bank learned from the others.

    A centre that lies nearest to a patch of an image is that image's own: an odd patch would find itself there. So each
    patch is scored by the nearest centre that is not its image's own, and where all of its targets are, the whole bank
    is searched. The image's score is the maximum over its patches: that of a test, but for the map's smoothing. A bank
    of means, in which all images count, has no centre that is anyone's own.

    Args:
        model: The network, with its memory bank.
        bank_images: Paths of the images that the memory bank came from, to which its sources refer.
        images: Paths of the images that are trained on.
    """

    def __init__(self, model: CfaModel, bank_images: Sequence[str], images: Sequence[str]) -> None:
        self._model = model
        self._images = images
        # By path: a data set may hold an image twice.
        self._places = {path: place for place, path in enumerate(images)}
        self._owners = self._owners_of(bank_images)
        self._scores = torch.full((len(images),), torch.nan)
        self._coming: list[int] = []

    def _owners_of(self, bank_images: Sequence[str]) -> Tensor:
        """Each centre's image, as its place among those trained on, of shape (N,); others where it is none of them."""
        bank = self._model.memory_bank
        owners = torch.full((len(bank.centers),), _NOBODY, device=bank.centers.device)
        numbers = bank.sources[:, 0].long()
        if len(numbers) == len(owners) and int(numbers.min()) >= 0 and int(numbers.max()) < len(bank_images):
            places = [self._places.get(path, _NOBODY) for path in bank_images]
            owners = torch.tensor(places, device=owners.device)[numbers]
        return owners

    def start_batch(self, paths: Sequence[str] | None) -> None:
        """Say whose patches come next.

        Args:
            paths: The images' paths. None: they are not known, and the batch is passed over.
        """
        self._coming = [self._places.get(str(path), _UNKNOWN) for path in paths or []]

    @torch.no_grad()
    def update(self, squared: Tensor, indices: Tensor, descriptors: Tensor) -> None:
        """Take in the next images of the batch.

        Args:
            squared: Squared distances of each patch to its nearest centres, nearest first, of shape (B, h, w, k).
            indices: Those centres' indices, of the same shape.
            descriptors: The patch descriptors, of shape (B, h, w, D).
        """
        count = len(squared)
        if len(self._coming) < count:
            return
        places, self._coming = torch.tensor(self._coming[:count]), self._coming[count:]
        image = places.to(indices.device)[:, None, None].expand(indices.shape[:3])
        others = squared.masked_fill(self._owners[indices] == image[..., None], torch.inf)
        nearest, first = others.min(dim=-1, keepdim=True)
        nearest, indices = nearest[..., 0].sqrt(), indices.gather(-1, first)[..., 0]
        only_own = nearest.isinf()
        if only_own.any():
            nearest[only_own], indices[only_own] = self._search(descriptors[only_own].float(), image[only_own])
        if self._model.score in {"local", "calibrated"}:
            nearest = self._model.calibration(nearest, indices)
        known = places >= 0
        self._scores[places[known]] = nearest.flatten(1).amax(dim=1).float().cpu()[known]

    def _search(self, patches: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Distances of patches, of shape (P, D), to the nearest centre that is not their image's own, and its index."""
        centers = self._model.memory_bank.centers.float()
        found = []
        rows = block_rows(patches, len(centers))
        for block, image in zip(patches.split(rows), images.split(rows), strict=True):
            distances = torch.cdist(block, centers).masked_fill_(self._owners == image[:, None], torch.inf)
            found.append(distances.min(dim=1))
        distances, indices = (torch.cat(part) for part in zip(*found, strict=True))
        return distances, indices

    def worst(self, processes: Processes) -> WorstFitting:
        """The images that stand out from all that were taken in since the fit began, each by its last score.

        Args:
            processes: Those that share the images.
        """
        finite = self._scores.isfinite()  # where there is one image, no centre is another's
        sums = torch.stack([self._scores.where(finite, 0), finite.float()]).to(self._owners.device)
        total, count = processes.sum(sums).cpu()
        seen = count.nonzero().squeeze(1)
        scores = (total / count)[seen]
        return [(self._images[int(seen[place])], float(scores[place])) for place in stand_out(scores)]


def log_worst(worst: WorstFitting) -> None:
    """Name the images that fit worst, for a person to look at.

    Args:
        worst: Their paths and scores.
    """
    if not worst:
        logger.info("No training image stands out from the others")
        return
    names = "".join(f"\n  {path} ({score:.3g})" for path, score in worst)
    logger.warning("These training images stand out from the others; look whether they are normal:%s", names)


def saved_worst_fitting(saved: object) -> WorstFitting:
    """What a checkpoint says of the images that fit worst; nothing where it says nothing, or is damaged there.

    Args:
        saved: The entry, None where there is none.
    """
    pairs = saved if isinstance(saved, list) else []
    pairs = [pair for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]
    return [(path, score) for path, score in pairs if isinstance(path, str) and isinstance(score, float)]
