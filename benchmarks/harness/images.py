"""Sets of images in MVTec AD's layout, of any image format, with masks or without."""

from pathlib import Path
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from torch import Tensor


class ImageSet(Folder):
    """A set in MVTec AD's layout, all of it tested.

    Args:
        root: The set's folder.
        training_images: How many normal images to train on, drawn by the seed; None: all.
        seed: Chooses the training images.
        test_step: Test only every n-th image.
    """

    def __init__(self, root: Path, training_images: int | None = None, seed: int = 0, test_step: int = 1) -> None:
        kinds = sorted(path.name for path in (root / "test").iterdir() if path.is_dir() and path.name != "good")
        self.has_masks = (root / "ground_truth").is_dir()
        super().__init__(
            name=root.name,
            root=root,
            normal_dir="train/good",
            normal_test_dir="test/good",
            abnormal_dir=[f"test/{kind}" for kind in kinds],
            mask_dir=[f"ground_truth/{kind}" for kind in kinds] if self.has_masks else None,
            train_batch_size=32,
            eval_batch_size=8,
            num_workers=0,
            val_split_mode="none",
        )
        self.training_images, self.draw, self.test_step = training_images, seed, test_step

    def _setup(self, _stage: str | None = None) -> None:
        super()._setup(_stage)
        count = len(self.train_data)
        if self.training_images is not None and self.training_images < count:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.draw)).tolist()
            self.train_data = self.train_data.subsample(sorted(order[: self.training_images]))
        self.test_data = self.test_data.subsample(range(0, len(self.test_data), self.test_step))


def load_image(model: Any, path: Path) -> Tensor:
    """A batch of one image that has passed a model's pre-processor."""
    image: Tensor = model.pre_processor.transform(read_image(path, as_tensor=True))
    return image[None]
