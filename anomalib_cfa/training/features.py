"""The pooled features of a fit's training images: computed, kept, and walked over before training starts.

Lightning starts the training loader before a fit, and its workers would read the images that the memory bank is then
made of. Therefore:

1. The model's ``setup`` makes a :class:`TrainingFeatures`, which takes the place of the data module's
   ``train_dataloader``.
2. ``on_fit_start`` calls Lightning's ``setup_data``. It asks for the training loader, gets a :class:`TrainingLoader`,
   and starts it: it gives nothing.
3. The memory bank is built by walking over the :class:`TrainingFeatures`: a second loader gives each image once, and
   the features are kept.
4. ``on_train_start`` lets the training loader read, and starts it again, in the order of the epoch at hand. From then
   on it gives images, or only their places where their features are kept.
5. ``teardown`` gives the data module its own ``train_dataloader`` back; after an exception, in which Lightning does not
   call it, :class:`TeardownOnException` does.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset, ImageBatch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

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
from anomalib_cfa.training.shards import bank_places, shard_loader

if TYPE_CHECKING:
    from anomalib_cfa.lightning_model import Cfa


class TrainingFeatures:
    """Gives the pooled feature pyramids of training batches, for the length of one fit of ``module``.

    Until :meth:`detach`, it gives the data module's training loader in the data module's place.
    """

    def __init__(self, module: "Cfa") -> None:
        self.module = module
        self.store: FeatureStore | None = None
        self.image_size: tuple[int, int] = (0, 0)  # of the images read last, in pixels
        self._bank_places: list[int] | None = None
        self._has_begun = False
        self._attributes: dict[str, Any] = {}  # the data module's
        self._own: Any = None  # the loader's among them, if it is not the class's method
        datamodule = getattr(module.trainer, "datamodule", None)
        if isinstance(datamodule, AnomalibDataModule):
            self._attributes = vars(datamodule)
            self._own = self._attributes.get("train_dataloader")
            self._original = datamodule.train_dataloader
            self._attributes["train_dataloader"] = self._training_loader

    def detach(self) -> None:
        """Give the data module its own loader back."""
        if self._attributes.get("train_dataloader") == self._training_loader:
            del self._attributes["train_dataloader"]
            if self._own is not None:
                self._attributes["train_dataloader"] = self._own

    def _training_loader(self) -> DataLoader[Any]:
        trainer, pre_processor, hparams = self.module.trainer, self.module.pre_processor, self.module.hparams
        loader = self._original()
        check_images(loader, pre_processor)
        folder = Path(trainer.default_root_dir)
        self.store = feature_store(loader, pre_processor, hparams["feature_budget"], folder, self.store)
        loader = training_loader(loader, trainer, hparams["seed"], self.store)
        if self._has_begun:  # reloaded for a later epoch
            self._let_read(loader)
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
        if self._bank_places is None:
            self._bank_places = bank_places(self.module.trainer)
        return self._bank_places

    def start_epoch(self) -> None:
        """Notice if the images are no longer treated as when their features were kept."""
        if self.store is not None:
            loader: Any = self.module.trainer.train_dataloader
            renew_if_treated_otherwise(self.store, loader, self.module.pre_processor)

    def start_training(self) -> None:
        """Let the loader begin, in this epoch's order."""
        trainer = self.module.trainer
        loader: Any = trainer.train_dataloader
        self._has_begun = True
        if self._let_read(loader):
            if isinstance(loader.sampler, DistributedSampler):
                loader.sampler.set_epoch(trainer.current_epoch)
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]  # noqa: SLF001 - what Lightning does itself

    def _let_read(self, loader: Any) -> bool:
        """Let a loader give batches, without workers if no image is left to be read; whether it gave none so far."""
        if not isinstance(loader, TrainingLoader):
            return False
        if self.store is not None and self.store.is_complete:
            loader.num_workers = 0
            loader.timeout = 0  # torch has one for workers only
        loader.starts_empty = False
        return True

    def pyramid(self, batch: ImageBatch | IndexedBatch) -> list[Tensor]:
        """The pyramid of a pre-processed batch: of images, or of places of images whose features may be kept."""
        if isinstance(batch.image, Tensor):
            height, width = batch.image.shape[-2:]
            self.image_size = height, width
            self.module.model.check_image_size(height, width)
        if not isinstance(batch, IndexedBatch):
            images: Any = batch.image
            return self.module.model.pyramid(images)
        assert self.store is not None
        if batch.image is None:
            return self.store.get(batch.index, self.module.device)
        return self.store.complete(batch, self.module.model.pyramid(batch.image))

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
            if isinstance(self.module.pre_processor, PreProcessor):
                self.module.pre_processor.on_train_batch_start(trainer, self.module, batch, batch_idx=0)
            with trainer.precision_plugin.forward_context():
                yield self.pyramid(batch)


class TeardownOnException(Callback):
    """Ends a run that failed as one that did not: what follows in the same process finds everything as it was."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Call the model's ``teardown``."""
        del exception
        assert trainer.state.fn is not None
        pl_module.teardown(trainer.state.fn)
