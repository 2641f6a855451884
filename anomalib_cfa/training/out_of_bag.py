"""Training images scored as if they were new: each by what the memory bank learned from the others."""

from collections.abc import Iterator, Sequence

import torch
from anomalib.data import InferenceBatch
from torch import Tensor

from anomalib_cfa.processes import Processes
from anomalib_cfa.torch_model import CfaModel, PatchScores
from anomalib_cfa.training.worst_fitting import WorstFitting, stand_out

_NOBODY, _UNKNOWN = -1, -2  # in place of an image: the centre belongs to none, the image is not listed


class OutOfBagScores:
    """Scores an epoch's training images, from the targets that training finds anyway.

    A centre that lies nearest to a patch of an image is that image's own: any patch of it would find itself there. So
    each patch is scored by the nearest centres that are not its image's own, and where all of its targets are, the
    whole bank is searched. A bank of means, in which all images count, has no centre that is anyone's own.

    What is found is kept until the next epoch, 8 bytes for each patch and each of the centres that score it, since the
    score is calibrated at the end of one.

    Args:
        model: The network, with its memory bank.
        bank_paths: Paths of the images that the memory bank came from, to which its sources refer.
        images: Paths of the images that are trained on.

    Attributes:
        knows_owners: Whether any centre is known to be of one of the images. If not, these may be the same images at
            another place, and their scores would be far too low.
    """

    def __init__(self, model: CfaModel, bank_paths: Sequence[str], images: Sequence[str]) -> None:
        self._model = model
        self._images = images
        # By path: a data set may hold an image twice.
        self._places = {path: place for place, path in enumerate(images)}
        self._owners = self._owners_of(bank_paths)
        self.knows_owners = not len(model.memory_bank.sources) or bool((self._owners != _NOBODY).any())
        self._scores = torch.full((len(images),), torch.nan)
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []  # places, squared distances and indices of some images
        self._coming: list[int] = []
        self._image_size = (0, 0)

    def _owners_of(self, bank_paths: Sequence[str]) -> Tensor:
        """Each centre's image, as its place among those trained on, of shape (N,); others where it is none of them."""
        bank = self._model.memory_bank
        owners = torch.full((len(bank.centers),), _NOBODY, device=bank.centers.device)
        numbers = bank.sources[:, 0].long()
        if len(numbers) == len(owners) and int(numbers.min()) >= 0 and int(numbers.max()) < len(bank_paths):
            places = [self._places.get(path, _NOBODY) for path in bank_paths]
            owners = torch.tensor(places, device=owners.device)[numbers]
        return owners

    def start_epoch(self) -> None:
        """Forget what was found of the images; the scores that :meth:`worst` has seen are kept."""
        self._found = []

    def start_batch(self, paths: Sequence[str] | None, image_size: tuple[int, int]) -> None:
        """Say whose patches come next, and the size of the images in pixels. A batch without paths is passed over."""
        self._coming = [self._places.get(str(path), _UNKNOWN) for path in paths or []]
        self._image_size = image_size

    @torch.no_grad()
    def update(self, squared: Tensor, indices: Tensor, descriptors: Tensor) -> None:
        """Take in the next images of the batch: what :meth:`CfaModel.targets` found."""
        count = len(squared)
        if len(self._coming) < count:
            return
        places, self._coming = torch.tensor(self._coming[:count]), self._coming[count:]
        image = places.to(indices.device)[:, None, None].expand(indices.shape[:3])
        elsewhere = squared.masked_fill(self._owners[indices] == image[..., None], torch.inf)
        nearest, order = elsewhere.topk(self._model.scored_neighbors, largest=False)
        indices = indices.gather(-1, order)
        lacking = nearest[..., -1].isinf()
        if lacking.any():
            wanted = descriptors[lacking], self._owners, image[lacking], self._model.scored_neighbors
            nearest[lacking], indices[lacking] = self._model.memory_bank.index.nearest_of_others(*wanted)
        self._found.append((places, nearest.cpu(), indices.int().cpu()))

    @torch.no_grad()
    def predictions(self) -> Iterator[InferenceBatch]:
        """Scores (B,) and maps (B, H, W) of the epoch's images by the model as it is now.

        An image that all centres came from has none, so that a batch may be empty.
        """
        for _, of_map, of_image in self._patch_scores():
            scored = of_map.flatten(1).isfinite().all(dim=1)
            yield self._model.smooth(PatchScores(of_map[scored], of_image[scored]), self._image_size).predictions()

    def _patch_scores(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Places of images, and the scores of their patches for the map and for the image."""
        device = self._owners.device
        for places, squared, indices in self._found:
            yield places, *self._model.score_distances(squared.to(device), indices.to(device))

    def worst(self, processes: Processes) -> WorstFitting:
        """The images that stand out from all that were taken in since the fit began, each by its last score."""
        for places, _, of_image in self._patch_scores():
            known = places >= 0
            self._scores[places[known]] = of_image.flatten(1).amax(dim=1).float().cpu()[known]
        finite = self._scores.isfinite()
        sums = torch.stack([self._scores.where(finite, 0), finite.float()]).to(self._owners.device)
        total, count = processes.sum(sums).cpu()
        seen = count.nonzero().squeeze(1)
        scores = (total / count)[seen]
        return [(self._images[int(seen[place])], float(scores[place])) for place in stand_out(scores)]
