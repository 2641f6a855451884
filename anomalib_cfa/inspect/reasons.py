"""Why a patch scores high: the training patch that its nearest centre came from."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from anomalib_cfa.lightning_model import Cfa

Place = tuple[float, float]


@dataclass(frozen=True)
class Reason:
    """What an image's worst patch was compared with."""

    place: Place  # the middle of the worst patch: x and y, as parts of the model's view of the image
    normal: Path  # the training image that the nearest centre came from
    normal_place: Place  # the middle of the patch there


def find_reason(model: Cfa, descriptors: Tensor) -> Reason | None:
    """Find the worst patch of an image with descriptors (h, w, D), and the normal patch nearest to it.

    None if the model cannot tell: it was saved by 0.1.0, or its bank is of mean features.
    """
    network, images = model.model, model.training_images
    sources = network.memory_bank.sources
    if not images or not len(sources):
        return None
    squared, indices = network.memory_bank.nearest(descriptors[None], network.scored_neighbors)
    scores = network.score_distances(squared, indices).of_image[0]
    height, width = scores.shape
    row, column = divmod(int(scores.argmax()), width)
    image, normal_row, normal_column = sources[indices[0, row, column, 0]].tolist()
    if not 0 <= image < len(images):
        return None
    return Reason(
        ((column + 0.5) / width, (row + 0.5) / height),
        Path(images[image]),
        ((normal_column + 0.5) / width, (normal_row + 0.5) / height),
    )
