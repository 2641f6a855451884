"""Keeps the frozen backbone's features of the training images, which are the same in every epoch."""

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from anomalib.data import AnomalibDataset, DatasetItem, ImageBatch
from torch import Tensor
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

# An image's place in the data set, its file's signature, and what was read if its features are not kept.
Item: TypeAlias = tuple[int, int, "DatasetItem[Any] | None"]


@dataclass
class IndexedBatch:
    """A training batch of which only the images whose features are not kept had to be read.

    To callbacks it says what anomalib's ``ImageBatch`` does, but for the pixels.
    """

    image_path: list[str]  # each image's file
    index: Tensor  # each image's place in the data set, of shape (B,)
    signature: Tensor  # what :func:`file_signature` said of each image's file, of shape (B,)
    missing: Tensor  # True where the features are not kept, of shape (B,)
    image: Tensor | None  # the missing ones, of shape (missing, 3, H, W); pre-processors know this name
    gt_label: Tensor  # False for each, as training images are normal, of shape (B,)
    gt_mask: None = None  # pre-processors know this name, too

    def __len__(self) -> int:
        return len(self.index)

    @property
    def batch_size(self) -> int:
        """How many images it is of, read or not."""
        return len(self)


class FeatureStore:
    """Pooled feature pyramids of a data set's images, in half precision, in memory or in a file.

    Args:
        count: Images in the data set.
        budget: Bytes that may be held in memory; beyond it the features go to a memory-mapped file.
        folder: Where such a file is made. It is unlinked from the start, so that nothing is left behind however the
            process ends.

    Attributes:
        enabled: Whether new features are kept.
        treatment: How the images were treated before the backbone, to notice when that changes.
    """

    def __init__(self, count: int, budget: int, folder: Path) -> None:
        self.count = count
        self.budget = budget
        self.folder = folder
        # Shared with the data loader's workers, which need not read an image whose features are kept. 0: not kept.
        self.signatures = torch.zeros(count, dtype=torch.int64).share_memory_()
        self.enabled = True
        self.treatment = ""
        self._levels: list[Tensor] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the features of all images are kept."""
        return bool(self.signatures.all())

    def put(self, index: Tensor, signature: Tensor, pyramid: Sequence[Tensor]) -> None:
        """Keep the pyramids, of shape (B, C_l, h_l, w_l), of the images at ``index``; too large a value is not kept."""
        maps = [features.permute(0, 2, 3, 1).to("cpu", torch.float16) for features in pyramid]
        if self._levels is None:
            self._levels = self._allocate([level.shape[1:] for level in maps])
        for level, new in zip(self._levels, maps, strict=True):
            level[index.cpu()] = new
        finite = torch.stack([level.isfinite().flatten(1).all(dim=1) for level in maps]).all(dim=0)
        self.signatures[index.cpu()] = signature.cpu() * finite * self.enabled

    def get(self, index: Tensor, device: torch.device) -> list[Tensor]:
        """The kept pyramids, of shape (B, C_l, h_l, w_l) in float32 and channels-last memory order."""
        assert self._levels is not None
        return [level[index.cpu()].to(device).float().permute(0, 3, 1, 2) for level in self._levels]

    def complete(self, batch: IndexedBatch, fresh: Sequence[Tensor]) -> list[Tensor]:
        """The pyramids of a whole batch, of which those of the missing images are ``fresh`` and kept from now on.

        Fresh ones are given back as they are kept, rounded, so that a resumed run sees what an uninterrupted one does.
        """
        index = batch.index[batch.missing]
        self.put(index, batch.signature[batch.missing], fresh)
        pyramid = self.get(batch.index, fresh[0].device)
        overflowed = self.signatures[index.cpu()] == 0
        if overflowed.any():
            positions = batch.missing.cpu().nonzero().squeeze(1)[overflowed]
            for level, new in zip(pyramid, fresh, strict=True):
                level[positions.to(level.device)] = new[overflowed.to(new.device)].float()
        return pyramid

    def _allocate(self, shapes: Sequence[torch.Size]) -> list[Tensor]:
        sizes = [self.count * shape.numel() for shape in shapes]
        needed = 2 * sum(sizes)
        in_memory = needed <= self.budget
        where = "memory" if in_memory else f"a temporary file in {self.folder}"
        logger.info("Keeping the features of %d images in %s: %.2f GiB", self.count, where, needed / 2**30)
        if in_memory:
            flat = torch.empty(sum(sizes), dtype=torch.float16)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(self.folder).free) < needed:
                msg = (
                    f"feature_budget is too small for the features to be kept in memory, and {self.folder} has "
                    f"{free / 2**30:.2f} GiB free where a file needs {needed / 2**30:.2f}; set feature_budget=0"
                )
                raise OSError(msg)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # Taken now: a disk that another process fills later would end this one with a bus error.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, needed)
                flat = torch.from_numpy(np.memmap(file, dtype=np.float16, mode="w+", shape=sum(sizes)))
        return [part.view(self.count, *shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


class IndexedDataset(Dataset[Any]):
    """An anomalib data set that reads an image only where its features are not kept, as a store's signatures tell."""

    def __init__(self, dataset: AnomalibDataset, signatures: Tensor) -> None:
        self.dataset = dataset
        self.signatures = signatures
        self.paths = list(dataset.samples.image_path)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        signature = file_signature(self.paths[index])
        kept = signature == int(self.signatures[index])
        return index, signature, None if kept else self.dataset[index]

    def collate_fn(self, items: Sequence[Item]) -> IndexedBatch:
        """Make a batch of items."""
        index, signature, images = zip(*items, strict=True)
        read: Any = [image for image in images if image is not None]
        stacked: Any = ImageBatch.collate(read) if read else None
        return IndexedBatch(
            image_path=[str(self.paths[place]) for place in index],
            gt_label=torch.zeros(len(index), dtype=torch.bool),
            index=torch.tensor(index),
            signature=torch.tensor(signature),
            missing=torch.tensor([image is not None for image in images]),
            image=stacked.image if stacked is not None else None,
        )


def file_signature(path: str | os.PathLike[str]) -> int:
    """A number other than 0 that changes when the file does."""
    status = Path(path).stat()
    return hash((status.st_mtime_ns, status.st_size, status.st_ino)) or 1
