from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalib_cfa.bank.k_means import _ITERATIONS, _lloyd, k_means, proportional_shares


def clustered(count: int, seed: int = 0) -> torch.Tensor:
    """Points around thirty middles."""
    generator = torch.Generator().manual_seed(seed)
    middles = 3 * torch.randn(30, 8, generator=generator)
    return middles[torch.randint(30, (count,), generator=generator)] + torch.randn(count, 8, generator=generator)


def inertia(points: torch.Tensor, centers: torch.Tensor) -> float:
    return float(torch.cdist(points, centers).min(dim=1).values.square().sum())


as_on_an_accelerator = partial(_lloyd, iterations=_ITERATIONS)
BOTH = pytest.mark.parametrize("cluster", [k_means, as_on_an_accelerator])


@BOTH
def test_depends_on_its_seed_alone_and_beats_random_centers(cluster):
    points = clustered(400)
    torch.manual_seed(0)
    first, _ = cluster(points, 40, seed=1)
    torch.manual_seed(1)
    assert torch.equal(first, cluster(points, 40, seed=1)[0])
    assert inertia(points, first) < 0.9 * inertia(points, points[:40])


def test_two_levels_are_as_good_as_one(monkeypatch):
    points = clustered(9000)
    two, _ = k_means(points, 2250, seed=0)
    monkeypatch.setattr("anomalib_cfa.bank.k_means._FEWEST_FOR_TWO_LEVELS", 10**6)
    one, _ = k_means(points, 2250, seed=0)
    assert two.shape == one.shape
    assert inertia(points, two) < 1.05 * inertia(points, one)


@pytest.mark.parametrize(("count", "clusters"), [(300, 40), (6500, 2100)])
def test_an_accelerator_clusters_as_well(count, clusters):
    points = clustered(count)
    ours, theirs = (
        sum(inertia(points, cluster(points, clusters, seed)[0]) for seed in range(5))
        for cluster in (as_on_an_accelerator, k_means)
    )
    assert ours < 1.03 * theirs


@BOTH
def test_equal_points_are_clustered(cluster):
    points = clustered(20).repeat(10, 1)
    centers, _ = cluster(points, 50, seed=0)
    assert centers.isfinite().all()
    assert torch.cdist(centers, points).amin(dim=1).max() < 5


@BOTH
@pytest.mark.parametrize(("count", "clusters"), [(300, 40), (300, 300), (6500, 2100), (2500, 2500)])
def test_each_center_names_a_point_that_is_nearest(count, clusters, cluster):
    points = clustered(count)
    centers, nearest = cluster(points, clusters, seed=0)
    assert centers.shape == (clusters, 8)
    to_named = (centers - points[nearest]).norm(dim=1)
    to_nearest = torch.cdist(centers, points).min(dim=1).values
    assert (to_named < to_nearest + 1e-4).float().mean() > 0.95  # a nearer one may be another centre's
    assert len(nearest.unique()) == clusters


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=20), data=st.data())
def test_shares_are_proportional(sizes, data):
    total = data.draw(st.integers(1, sum(sizes)))
    shares = proportional_shares(sizes, total)
    assert sum(shares) == total
    for share, size in zip(shares, sizes, strict=True):
        assert 0 <= share <= size
        assert abs(share - size * total / sum(sizes)) < 1
