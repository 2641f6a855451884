from types import SimpleNamespace

from torch.utils.data import DataLoader

from anomalib_cfa.training.shards import shard_loader


def started(worker: int) -> None:
    """What a data set needs in each of its workers."""


def shard(loader: DataLoader) -> DataLoader:
    return shard_loader(SimpleNamespace(train_dataloader=loader, global_rank=1, world_size=2), list(range(5)))


def test_a_share_is_read_as_the_training_loader_reads():
    loader = DataLoader(range(5), batch_size=2, num_workers=1, worker_init_fn=started, timeout=7, prefetch_factor=3)
    own = shard(loader)
    assert list(own.dataset) == [1, 3]
    assert (own.num_workers, own.worker_init_fn, own.timeout, own.prefetch_factor) == (1, started, 7, 3)


def test_a_share_is_read_after_the_workers_have_gone():
    loader = DataLoader(range(5), batch_size=2, num_workers=1)  # which sets a prefetch factor
    loader.num_workers = 0
    assert [batch.tolist() for batch in shard(loader)] == [[1, 3]]
