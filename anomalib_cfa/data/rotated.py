"""RD-MVTec AD: MVTec AD with each image turned and cropped at random, the paper's harder setting."""

import math
import zlib
from pathlib import Path
from typing import Any

import torch
from anomalib.data import DatasetItem, MVTecAD, MVTecADDataset
from anomalib.data.utils import Split
from torch import Tensor
from torchvision.transforms import v2


class RotatedMVTecAD(MVTecAD):
    """MVTec AD whose images are turned by a random angle and cropped at a random place (RD-MVTec AD).

    The paper's setting: images of 256 x 256 pixels, turned within ±10°, cropped to 224 x 224. What the turn uncovers is
    black. A training image is drawn anew each time that it is read; a test or validation image is always drawn alike,
    from ``seed`` and its path below ``root``, whatever the order, the number of workers and the process's random state.

    Image and mask are turned and cropped together. The authors' code draws for them independently, so that its masks do
    not lie over the defects: **pixel figures measured here are not comparable with the paper's for RD-MVTec AD**, and
    image figures are of other draws.

    The model's own size should be the crop's, ``Cfa(image_size=224)``, for it resizes what it is given. With
    ``val_split_mode="synthetic"`` or ``"from_train"`` validation images are drawn anew each time, too.

    Args:
        root: Folder of MVTec AD.
        category: Name of the category.
        degrees: The largest angle, in either direction.
        image_size: Height and width to resize to before the turn, in pixels.
        crop_size: Height and width of the crop after it.
        seed: Governs the draws of the test split and random splits.
        **kwargs: Those of ``MVTecAD``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        It goes where anomalib takes a data module by its class path, and into the config of
        ``python -m anomalib_cfa.benchmark``; plain ``anomalib benchmark`` knows the data modules of anomalib only::

            anomalib train --model Cfa --model.image_size 224 \
                --data anomalib_cfa.data.RotatedMVTecAD --data.category screw
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/MVTecAD",
        category: str = "bottle",
        degrees: float = 10.0,
        image_size: int = 256,
        crop_size: int = 224,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        pose = RandomPose(degrees, image_size, crop_size)
        super().__init__(root, category, augmentations=pose, seed=seed, **kwargs)

    def _setup(self, _stage: str | None = None) -> None:
        super()._setup(_stage)
        self.test_data = _PosedDataset(self.root, self.category, split=Split.TEST, seed=self.seed)


class RandomPose(v2.Transform):  # type: ignore[misc]
    """Resize, then turn by a random angle, then crop at a random place: all its inputs alike, masks without blending.

    Not a plain ``Compose``, in which anomalib would take the resize for a mistaken duplicate of the model's. Arguments
    and errors are those of :class:`RotatedMVTecAD`.
    """

    def __init__(self, degrees: float = 10.0, image_size: int = 256, crop_size: int = 224) -> None:
        if not (math.isfinite(degrees) and 0 <= degrees <= 180):
            msg = f"degrees must be between 0 and 180, but is {degrees!r}"
            raise ValueError(msg)
        if not 1 <= crop_size <= image_size:
            msg = f"crop_size must be at least 1 and at most image_size = {image_size!r}, but is {crop_size!r}"
            raise ValueError(msg)
        super().__init__()
        self.steps = v2.Compose(
            [
                v2.Resize((image_size, image_size), antialias=True),
                v2.RandomRotation(degrees, interpolation=v2.InterpolationMode.BILINEAR),
                v2.RandomCrop((crop_size, crop_size)),
            ]
        )

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Give an image (..., H, W), or an image and its mask, a ``torchvision.tv_tensors.Mask``, the same new pose."""
        posed: Tensor | tuple[Tensor, ...] = self.steps(*inputs)
        return posed


class _PosedDataset(MVTecADDataset):
    """MVTec AD whose random augmentations depend on a seed and the image's path, and on nothing else."""

    def __init__(self, root: Path, category: str, split: Split, seed: int | None) -> None:
        super().__init__(root, category, split=split)
        self.seed = seed

    def __getitem__(self, index: int) -> DatasetItem[Any]:
        place = "/".join(Path(self.samples.iloc[index].image_path).parts[-3:])  # wherever the data set lies
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{self.seed}/{self.category}/{place}".encode()))
            return super().__getitem__(index)
