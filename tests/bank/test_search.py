import copy
import pickle

import faiss
import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_cfa.bank.memory_bank import MemoryBank
from anomalib_cfa.bank.search import SEARCH_KINDS, CenterIndex, _part


def low_rank(count: int, width: int, rank: int, seed: int) -> torch.Tensor:
    """Vectors like a backbone's: most of their variance lies along few axes."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, width, generator=torch.Generator().manual_seed(99))
    scale = torch.logspace(0, -1.5, rank)
    noise = 0.01 * torch.randn(count, width, generator=generator)
    return torch.randn(count, rank, generator=generator) * scale @ basis + noise


def image(height: int, width: int, channels: int, seed: int) -> torch.Tensor:
    """Descriptors of an image whose neighbouring patches resemble each other, of shape (1, h, w, D)."""
    coarse = low_rank(height * width // 16 + 1, channels, 24, seed)[: height * width // 16]
    maps = coarse.T.reshape(1, channels, height // 4, width // 4)
    smooth = torch.nn.functional.interpolate(maps, (height, width), mode="bilinear")
    return smooth.permute(0, 2, 3, 1).contiguous()


@pytest.fixture(scope="module")
def centers() -> torch.Tensor:
    return low_rank(2500, 96, 24, seed=0)  # enough for two levels


@pytest.mark.parametrize(("kind", "recall"), [("exact", 1.0), ("two_level", 0.9)])
def test_the_nearest_centers_are_found_in_order(centers, kind, recall):
    queries = image(16, 20, 96, seed=1)
    expected = torch.cdist(queries.double(), centers.double()).topk(6, largest=False).indices
    squared, found = CenterIndex(centers, kind)(queries, 6)
    hits = (found[..., :, None] == expected[..., None, :]).any(dim=-1).float().mean()
    assert hits >= recall
    assert (squared.diff(dim=-1) >= 0).all()
    assert all(len(set(row)) == 6 for row in found.flatten(0, 2).tolist())


def test_the_two_level_search_is_hardly_farther_off_than_the_exact_one(centers):
    queries = torch.cat([image(16, 20, 96, seed) for seed in range(4)])
    exact, found = (CenterIndex(centers, kind)(queries, 1)[0].sqrt() for kind in ("exact", "two_level"))
    assert (found >= exact - 1e-5).all()
    assert (found / exact - 1).mean() < 0.01


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    centers=st.one_of(st.integers(1, 60), st.integers(1025, 1100)),
    width=st.integers(1, 70),
    kind=st.sampled_from(SEARCH_KINDS),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_any_shape_gives_k_different_centers_and_their_distances(shape, centers, width, kind, seed, data):
    k = data.draw(st.integers(1, min(centers, 40)))
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(centers, width, generator=generator)
    queries = torch.randn(*shape, width, generator=generator)
    squared, found = CenterIndex(points, kind)(queries, k)
    assert found.shape == squared.shape == (*shape, k)
    assert all(len(set(row)) == k for row in found.flatten(0, 2).tolist())
    measured = (queries[..., None, :] - points[found]).double().square().sum(dim=-1)
    torch.testing.assert_close(squared.double(), measured, rtol=1e-4, atol=1e-6)
    if kind == "exact":
        expected = plain.squared_distances(queries.double(), points.double(), k)
        torch.testing.assert_close(squared.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", SEARCH_KINDS)
def test_far_from_the_origin_the_same_centers_are_found(centers, kind):
    queries, far = image(8, 8, centers.shape[1], seed=1), 2.0**12
    _, expected = CenterIndex(centers, kind)(queries, k=3)
    moved = (centers + far).sub(far)  # what is left of their digits
    _, found = CenterIndex(moved + far, kind)(queries + far, k=3)
    assert (found == expected).float().mean() > 0.9


@pytest.mark.parametrize("kind", SEARCH_KINDS)
def test_blocks_of_any_size_give_the_same(centers, kind, monkeypatch):
    queries = torch.cat([image(8, 12, 96, seed) for seed in range(3)])
    whole = CenterIndex(centers, kind)(queries, 3)
    monkeypatch.setattr("anomalib_cfa.bank.distances._BLOCK_BYTES", 4 * 2500 * 7)
    in_blocks = CenterIndex(centers, kind)(queries, 3)
    torch.testing.assert_close(in_blocks[0], whole[0])


@settings(max_examples=30)
@given(count=st.integers(1, 300), width=st.integers(1, 5), seed=st.integers(0, 99), repeated=st.booleans())
def test_groups_part_the_centers_evenly(count, width, seed, repeated):
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    if repeated:
        vectors[:] = vectors[0].clone()
    groups = _part(vectors, torch.arange(count), -(-count // 16))
    assert sorted(torch.cat(groups).tolist()) == list(range(count))
    assert max(map(len, groups)) <= 16
    assert min(map(len, groups)) >= count // len(groups) - 1


@pytest.mark.parametrize("count", [40, 1500])
def test_neighbors_are_the_centers_nearest_to_each(centers, count):
    found = CenterIndex(centers[:count]).neighbors(8)
    expected = torch.cdist(centers[:count], centers[:count]).topk(8, largest=False).indices
    assert (found[:, 0] == torch.arange(count)).all()
    assert (found[..., None] == expected[:, None]).any(dim=-1).float().mean() > 0.9


@pytest.mark.parametrize(("kind", "recall"), [("exact", 1.0), ("two_level", 0.9)])
@pytest.mark.parametrize("k", [1, 3])
def test_the_nearest_of_others_are_nobody_elses(centers, kind, recall, k, monkeypatch):
    monkeypatch.setattr("anomalib_cfa.bank.distances._BLOCK_BYTES", 2**18)  # some queries at a time
    queries = image(8, 8, centers.shape[1], seed=1).flatten(0, 2)
    owners = torch.arange(len(centers)) % 5
    asking = torch.arange(len(queries)) % 6  # the last owns none
    squared, found = CenterIndex(centers, kind).nearest_of_others(queries, owners, asking, k)
    exact = torch.cdist(queries.double(), centers.double()).square()
    expected = exact.masked_fill(owners == asking[:, None], torch.inf).topk(k, largest=False).indices
    assert not (owners[found] == asking[:, None]).any()
    torch.testing.assert_close(squared.double(), exact.gather(1, found), rtol=1e-4, atol=1e-5)
    assert (found == expected).float().mean() >= recall


@pytest.mark.parametrize("kind", SEARCH_KINDS)
def test_whoever_owns_all_centers_finds_none(centers, kind):
    everything = torch.zeros(len(centers), dtype=torch.long)
    squared, _ = CenterIndex(centers, kind).nearest_of_others(centers[:5], everything, everything[:5], 2)
    assert squared.isinf().all()


def test_gradients_are_those_of_the_found_distances(centers):
    queries = image(8, 8, 96, seed=3).requires_grad_()
    squared, found = CenterIndex(centers)(queries, 4)
    weights = torch.rand(squared.shape)
    (ours,) = torch.autograd.grad((squared * weights).sum(), queries)
    plainly = (queries[..., None, :] - centers[found]).square().sum(-1)
    (expected,) = torch.autograd.grad((plainly * weights).sum(), queries)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing(centers, monkeypatch):
    monkeypatch.setattr("anomalib_cfa.bank.search._SPARE_CANDIDATES", 0)  # which would make up for a rough ranking
    queries, index = image(8, 8, 96, seed=4), CenterIndex(centers)
    patches, nobody = queries.flatten(0, 2), torch.full((len(centers),), -1)
    expected = index(queries, 2), index.nearest_of_others(patches, nobody, nobody[: len(patches)] + 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = index(queries, 2), index.nearest_of_others(patches, nobody, nobody[: len(patches)] + 1, 2)
    for (ours, _), (theirs, _) in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", SEARCH_KINDS)
def test_any_number_of_faiss_threads_gives_the_same(centers, kind):
    queries = image(8, 12, 96, seed=2)
    threads = faiss.omp_get_max_threads()
    try:
        results = []
        for count in (1, 2, 4):
            faiss.omp_set_num_threads(count)
            results.append(CenterIndex(centers, kind)(queries, 6)[1])
    finally:
        faiss.omp_set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_index_is_neither_pickled_nor_copied_nor_part_of_the_state(centers):
    bank = MemoryBank()
    bank.assign(centers)
    state = set(bank.state_dict())
    assert bank.index is bank.index
    assert set(bank.state_dict()) == state
    for copied in (pickle.loads(pickle.dumps(bank)), copy.deepcopy(bank)):
        assert copied._index is None
        queries = image(4, 4, 96, seed=5)
        assert torch.equal(copied.nearest(queries, 2)[1], bank.nearest(queries, 2)[1])


def loaded(bank: MemoryBank) -> None:
    bank.load_state_dict(bank.state_dict() | {"centers": bank.centers + 1})


def changed_in_place(bank: MemoryBank) -> None:
    bank.centers += 1


def assigned(bank: MemoryBank) -> None:
    bank.assign(bank.centers + 1)


@pytest.mark.parametrize("change", [loaded, changed_in_place, assigned, MemoryBank.double])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_change_of_the_bank_is_noticed(change, mode):
    bank, queries = MemoryBank(), torch.rand(1, 2, 2, 4)
    bank.assign(torch.rand(10, 4))
    with mode():
        bank.nearest(queries, 2)
    change(bank)
    with mode():
        found = bank.nearest(queries, 2)[0]
    expected = torch.cdist(queries, bank.centers.float()).square().topk(2, largest=False).values
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
