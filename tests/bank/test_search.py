import copy
import pickle
from unittest import mock

import faiss
import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_cfa.bank.memory_bank import MemoryBank
from anomalib_cfa.bank.search import (
    _GROUP,
    SEARCH_KINDS,
    NeighborSearch,
    _smallest,
    nearest_centers,
    squared_distances,
)


def low_rank(count: int, width: int, rank: int, seed: int) -> torch.Tensor:
    """Vectors like a backbone's: most of their variance lies along few axes."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, width, generator=torch.Generator().manual_seed(99))
    scale = torch.logspace(0, -1.5, rank)
    noise = 0.01 * torch.randn(count, width, generator=generator)
    return torch.randn(count, rank, generator=generator) * scale @ basis + noise


@pytest.fixture(scope="module")
def bank() -> MemoryBank:
    bank = MemoryBank()
    bank.assign(low_rank(2500, 96, 24, seed=0))  # enough for an inverted file
    return bank


@pytest.mark.parametrize(("kind", "recall"), [("exact", 1.0), ("ivf", 0.75), ("hnsw", 0.95)])
def test_finds_the_nearest_centers_in_order(bank, kind, recall):
    queries = low_rank(300, 96, 24, seed=1)
    expected = torch.cdist(queries.double(), bank.centers.double()).topk(6, largest=False)
    found = NeighborSearch(kind)(queries, bank.centers, 6)
    hits = (found[:, :, None] == expected.indices[:, None]).any(dim=2).float().mean()
    assert hits >= recall
    distances = squared_distances(queries, bank.centers, found)
    assert (distances.diff(dim=1) >= 0).all()
    assert all(len(set(row)) == 6 for row in found.tolist())


@settings(max_examples=40)
@given(
    queries=st.integers(1, 40),
    centers=st.integers(1, 60),
    width=st.integers(1, 20),
    kind=st.sampled_from(SEARCH_KINDS),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_any_shape_gives_k_different_centers(queries, centers, width, kind, seed, data):
    k = data.draw(st.integers(1, centers))
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(kind)
    bank.assign(torch.randn(centers, width, generator=generator))
    points = torch.randn(queries, width, generator=generator)
    found = bank.search(points, bank.centers, k)
    assert found.shape == (queries, k)
    assert all(len(set(row)) == k for row in found.tolist())
    assert found.min() >= 0
    assert found.max() < centers
    if kind == "exact":
        expected = plain.squared_distances(points.double(), bank.centers.double(), k)
        torch.testing.assert_close(
            squared_distances(points, bank.centers, found).double(), expected, rtol=1e-5, atol=1e-6
        )


def test_torch_search_finds_them_in_blocks_too(bank, monkeypatch):
    queries = low_rank(300, 96, 24, seed=1)
    whole = nearest_centers(queries, bank.centers, 3)[1]
    monkeypatch.setattr("anomalib_cfa.bank.search._BLOCK_BYTES", 4 * 2504 * 7)
    assert torch.equal(nearest_centers(queries, bank.centers, 3)[1], whole)
    expected = torch.cdist(queries.double(), bank.centers.double()).topk(3, largest=False).indices
    assert (whole == expected).float().mean() > 0.99


@settings(max_examples=60)
@given(rows=st.integers(1, 5), groups=st.integers(1, 12), k=st.integers(1, 20), seed=st.integers(0, 2**16))
def test_smallest_values_are_those_that_topk_finds(rows, groups, k, seed):
    # few different values, so that many are equal
    scores = torch.randint(30, (rows, groups * _GROUP), generator=torch.Generator().manual_seed(seed)).float()
    k = min(k, scores.shape[1])
    indices = _smallest(scores, k)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert torch.equal(scores.gather(1, indices), scores.topk(k, largest=False).values)


@settings(max_examples=60)
@given(
    count=st.integers(1, 80),
    width=st.integers(1, 24),
    spread=st.floats(1e-3, 1),
    offset=st.sampled_from([0.0, 3.0]),
    k=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_ranking_in_bfloat16_misses_no_more_than_its_rounding(count, width, spread, offset, k, seed):
    k = min(k, count)
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(1, width, generator=generator) + spread * torch.randn(count, width, generator=generator)
    queries = offset + torch.randn(20, width, generator=generator)
    with mock.patch("anomalib_cfa.bank.search._ranking_dtype", mock.Mock(return_value=torch.bfloat16)):
        found = nearest_centers(queries, centers, k)[0]
    # A score |v|^2 / 2 - q.v has both factors, the norm and itself rounded; a squared distance is twice a score, and
    # both what was found and what was missed may be off.
    vectors = (centers - centers.mean(dim=0)).norm(dim=1).max()
    lengths = (queries - centers.mean(dim=0)).norm(dim=1, keepdim=True)
    rounding = torch.finfo(torch.bfloat16).eps / 2
    bound = 2 * 2 * 4 * rounding * (vectors * lengths + vectors.square() / 2)
    nearest = plain.squared_distances(queries.double(), centers.double(), k)
    assert (found <= nearest * (1 + 1e-5) + 1e-6 + bound).all()


def test_nan_is_at_no_distance(bank):
    queries = low_rank(3, 96, 24, seed=1)
    queries[1, 5] = torch.nan
    squared, indices = nearest_centers(queries, bank.centers[:101], 2)
    assert squared.isnan().all(dim=1).tolist() == [False, True, False]
    assert indices.max() < 101


def test_distances_do_not_cancel_far_from_the_origin():
    generator = torch.Generator().manual_seed(0)
    centers = 1000 + torch.randn(50, 32, generator=generator)
    queries = centers[:20] + 1e-3 * torch.randn(20, 32, generator=generator)
    indices = torch.arange(20)[:, None]
    exact = (queries.double() - centers[:20].double()).square().sum(dim=1, keepdim=True)
    torch.testing.assert_close(squared_distances(queries, centers, indices).double(), exact, rtol=1e-5, atol=0)


def test_search_does_not_cancel_far_from_the_origin():
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank("exact")
    bank.assign(1000 + torch.randn(200, 32, generator=generator))
    queries = bank.centers[:50] + 0.1 * torch.randn(50, 32, generator=generator)
    expected = torch.cdist(queries.double(), bank.centers.double()).topk(3, largest=False).indices
    assert torch.equal(bank.search(queries, bank.centers, 3), expected)
    assert torch.equal(nearest_centers(queries, bank.centers, 3)[1], expected)


def test_gradient_flows_through_the_chosen_distances_only():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(30, 8, generator=generator, dtype=torch.float32)
    queries = torch.randn(12, 8, generator=generator, requires_grad=True)
    indices = torch.randint(30, (12, 4), generator=generator)
    weights = torch.randn(12, 4, generator=generator)
    (ours,) = torch.autograd.grad((squared_distances(queries, centers, indices) * weights).sum(), queries)
    (expected,) = torch.autograd.grad(((queries[:, None] - centers[indices]).square().sum(-1) * weights).sum(), queries)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kind", SEARCH_KINDS)
def test_any_number_of_faiss_threads_gives_the_same(bank, kind):
    queries = low_rank(400, 96, 24, seed=2)
    threads = faiss.omp_get_max_threads()
    try:
        results = []
        for count in (1, 2, 4):
            faiss.omp_set_num_threads(count)
            results.append(NeighborSearch(kind)(queries, bank.centers, 6))
    finally:
        faiss.omp_set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_index_is_neither_pickled_nor_copied(bank):
    search = NeighborSearch("hnsw")
    search(low_rank(4, 96, 24, seed=1), bank.centers, 3)
    assert len(pickle.dumps(search)) < 200
    assert copy.deepcopy(search)._index is None


def test_a_new_bank_is_searched_anew():
    bank = MemoryBank("exact")
    queries = torch.rand(5, 4, requires_grad=True)
    bank.assign(torch.rand(10, 4))
    bank.nearest(queries, 2)
    bank.assign(queries.detach().clone())
    assert (bank.nearest(queries, 1)[0] == 0).all()
    other = MemoryBank("exact")
    other.load_state_dict(MemoryBank("exact").state_dict() | {"centers": torch.rand(3, 4)})
    assert other.nearest(queries, 3)[0].shape == (5, 3)


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="search must be one of 'exact', 'ivf', 'hnsw', but is 'flat'"):
        NeighborSearch("flat")
