"""Which training images the memory bank is made of, and each process's share of them."""

import math
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset
from torch.utils.data.distributed import DistributedSampler


def bank_places(trainer: Trainer) -> list[int]:
    """Places in the data set of the images that training draws: each once, in the data set's order.

    A sampler of the user's own is asked once. Where the trainer limits training batches, they are the first epoch's.

    Raises:
        TypeError: If the trainer does not have exactly one loader for training, or its data set has no order.
        ValueError: If there are fewer images than processes, or several processes share a sampler of the user's own.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        msg = f"The training data must come from one DataLoader, but comes from {type(loader).__name__}"
        raise TypeError(msg)
    if isinstance(loader.dataset, IterableDataset):
        msg = (
            "The training data must be a data set with indices, since the memory bank takes each image once, but "
            f"{type(loader.dataset).__name__} is an IterableDataset"
        )
        raise TypeError(msg)
    places = _drawn(loader, trainer.world_size)
    batches = sized_len(loader)
    if batches is not None and trainer.num_training_batches < batches:
        batch_size = loader.batch_size or math.ceil(len(places) / batches)
        places = places[: int(trainer.num_training_batches) * batch_size * trainer.world_size]
    if len(places) < trainer.world_size:
        msg = (
            f"The training data must hold an image for each of {trainer.world_size} processes, but holds {len(places)}"
        )
        raise ValueError(msg)
    return sorted(places)


def shard_loader(trainer: Trainer, places: list[int]) -> DataLoader[Any]:
    """A loader of this process's share of the images at some places, in their order, each once over all processes."""
    loader: Any = trainer.train_dataloader
    return DataLoader(
        Subset(loader.dataset, places[trainer.global_rank :: trainer.world_size]),
        batch_size=loader.batch_size or math.ceil(len(places) / max(1, sized_len(loader) or len(places))),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        multiprocessing_context=loader.multiprocessing_context,
        worker_init_fn=loader.worker_init_fn,
        timeout=loader.timeout,
        prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
    )


def shuffles_all(sampler: object) -> bool:
    """Whether a sampler draws each image once, in a random order."""
    whole = isinstance(sampler, RandomSampler) and not sampler.replacement
    return whole and sampler.num_samples == len(sampler.data_source)  # type: ignore[attr-defined]


def _drawn(loader: DataLoader[Any], processes: int) -> list[int]:
    """Places of the images that an epoch draws, in its order if that is known."""
    dataset: Any = loader.dataset
    own: Any = loader.batch_sampler
    if own is None or type(own) is BatchSampler:
        own = loader.sampler if own is None else own.sampler
        if type(own) is DistributedSampler:  # in the order in which all processes together draw
            return list(DistributedSampler(dataset, 1, 0, shuffle=own.shuffle, seed=own.seed))
        if type(own) is SequentialSampler or shuffles_all(own):
            return list(range(len(dataset)))
    if processes > 1:
        msg = (
            f"The training data's sampler must be left to the trainer where {processes} processes share the images, "
            f"but is {type(own).__name__}"
        )
        raise ValueError(msg)
    return list({place: None for drawn in own for place in (drawn if isinstance(drawn, list | tuple) else (drawn,))})
