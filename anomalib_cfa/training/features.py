"""The pooled features of a fit's training images: computed, kept, and walked over before training starts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset, ImageBatch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from anomalib_cfa.torch_model import CfaModel
from anomalib_cfa.training.checks import check_batch
from anomalib_cfa.training.kept_features import FeatureStore, IndexedBatch
from anomalib_cfa.training.loaders import (
    TrainingLoader,
    check_images,
    feature_store,
    images_of,
    renew_if_treated_otherwise,
    training_loader,
)
from anomalib_cfa.training.shards import bank_images, shard_loader


@dataclass
class _Replaced:
    """Stands in for a data module's ``train_dataloader`` during a fit.

    Attributes:
        own: The data module's own attribute of that name, or None if it has its class's method only.
        call: What gives the loader meanwhile.
    """

    own: Callable[[], DataLoader[Any]] | None
    call: Callable[[], DataLoader[Any]]

    def __call__(self) -> DataLoader[Any]:
        return self.call()


class TrainingFeatures:
    """Gives the pooled feature pyramids of training batches, for the length of one fit.

    Args:
        module: The module that is fitted; attached to its trainer.
        model: Its network.
        pre_processor: What the images pass through.
        seed: Governs the order of images.
        budget: GiB of memory in which features may be kept; 0 keeps none.
    """

    def __init__(
        self, module: LightningModule, model: CfaModel, pre_processor: nn.Module | None, seed: int, budget: float
    ) -> None:
        self.module = module
        self.model = model
        self.pre_processor = pre_processor
        self.seed = seed
        self.budget = budget
        self.store: FeatureStore | None = None
        self.image_size: tuple[int, int] = (0, 0)  # of the images read last, in pixels
        self._bank_images: list[int] | None = None
        self._training = False
        self.datamodule: Any = getattr(module.trainer, "datamodule", None)
        if isinstance(self.datamodule, AnomalibDataModule):
            # What an interrupted fit left is put back first.
            TrainingFeatures.give_back(self.datamodule)
            own = vars(self.datamodule).get("train_dataloader")
            replaced = _Replaced(own, partial(self._training_loader, self.datamodule.train_dataloader))
            vars(self.datamodule)["train_dataloader"] = replaced

    def detach(self) -> None:
        """Give the data module its own loader back."""
        if self.datamodule is not None:
            self.give_back(self.datamodule)

    @staticmethod
    def give_back(datamodule: Any) -> None:  # noqa: ANN401 - anomalib's
        """Undo what a fit did to a data module; nothing if none did."""
        replaced = vars(datamodule).get("train_dataloader")
        if isinstance(replaced, _Replaced):
            del vars(datamodule)["train_dataloader"]
            if replaced.own is not None:
                vars(datamodule)["train_dataloader"] = replaced.own

    def _training_loader(self, original: Callable[[], DataLoader[Any]]) -> DataLoader[Any]:
        loader = original()
        check_images(loader, self.pre_processor)
        folder = Path(self.module.trainer.default_root_dir)
        self.store = feature_store(loader, self.pre_processor, self.budget, folder, self.store)
        loader = training_loader(loader, self.module.trainer, self.seed, self.store)
        if self._training:  # reloaded for a later epoch
            self._begin(loader)
        return loader

    def paths(self) -> list[str]:
        """Paths of the images that the memory bank is made of, in their order; none if the data set does not tell."""
        places = self._places()
        dataset = images_of(self.module.trainer.train_dataloader)
        if not isinstance(dataset, AnomalibDataset):
            return []
        paths = list(dataset.samples.image_path)
        return [str(paths[place]) for place in places]

    def _places(self) -> list[int]:
        """Places of those images in the data set, the same throughout a fit."""
        if self._bank_images is None:
            self._bank_images = bank_images(self.module.trainer)
        return self._bank_images

    def start_epoch(self) -> None:
        """Notice if the images are no longer treated as when their features were kept."""
        if self.store is not None:
            loader: Any = self.module.trainer.train_dataloader
            renew_if_treated_otherwise(self.store, loader, self.pre_processor)

    def start_training(self) -> None:
        """Let the loader begin, in this epoch's order."""
        trainer = self.module.trainer
        loader: Any = trainer.train_dataloader
        self._training = True
        if self._begin(loader):
            if isinstance(loader.sampler, DistributedSampler):
                loader.sampler.set_epoch(trainer.current_epoch)
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]  # noqa: SLF001 - what Lightning does itself

    def _begin(self, loader: Any) -> bool:  # noqa: ANN401
        """Let a loader give batches, without workers if no image is left to be read; whether it had to wait."""
        if not isinstance(loader, TrainingLoader):
            return False
        if self.store is not None and self.store.is_complete:
            loader.num_workers = 0
            loader.timeout = 0  # torch has one for workers only
        loader.waits = False
        return True

    def pyramid(self, batch: ImageBatch | IndexedBatch) -> list[Tensor]:
        """The pyramid of a pre-processed batch: of images, or of places of images whose features may be kept."""
        if isinstance(batch.image, Tensor):
            height, width = batch.image.shape[-2:]
            self.image_size = height, width
            self.model.check_image_size(height, width)
        if not isinstance(batch, IndexedBatch):
            images: Any = batch.image
            return self.model.pyramid(images)
        assert self.store is not None
        if batch.image is None:
            return self.store.get(batch.index, self.module.device)
        return self.store.complete(batch, self.model.pyramid(batch.image))

    def __len__(self) -> int:
        """Batches of this process's share of the images."""
        return len(shard_loader(self.module.trainer, self._places()))

    @torch.no_grad()
    def __iter__(self) -> Iterator[list[Tensor]]:
        """Features of this process's share of the images, each image once, treated as training treats them."""
        trainer = self.module.trainer
        for batch in shard_loader(trainer, self._places()):
            check_batch(batch)
            batch = trainer.strategy.batch_to_device(batch)  # noqa: PLW2901
            if isinstance(self.pre_processor, PreProcessor):
                self.pre_processor.on_train_batch_start(trainer, self.module, batch, batch_idx=0)
            with trainer.precision_plugin.forward_context():
                yield self.pyramid(batch)
