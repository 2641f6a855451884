import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_cfa.descriptor import PatchDescriptor
from anomalib_cfa.processes import Processes
from anomalib_cfa.whitening import PatchStatistics, whitening


def covariance_of(points: torch.Tensor) -> torch.Tensor:
    return torch.cov(points.double().T, correction=0)


@pytest.mark.parametrize("width", [12, 20])
@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_whitening_raises_variances_to_a_power_at_a_squared_distance_of_one(power, width):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(5000, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    covariance = covariance_of(points)
    mapped = (points.double() - points.double().mean(dim=0)) @ whitening(covariance, width, seed=0, power=power).T
    assert mapped.square().sum(dim=1).mean() == pytest.approx(1, rel=1e-5)
    before = torch.linalg.eigvalsh(covariance)
    wanted = before * (before + 0.01 * before.mean()).pow(-power)  # the least of them stay small
    after = torch.linalg.eigvalsh(covariance_of(mapped))[-12:]
    torch.testing.assert_close(after, (wanted / wanted.sum()).sort().values)


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_a_narrower_map_keeps_the_squared_distance_on_average(power):
    factor = torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = factor @ factor.T
    maps = [whitening(covariance, 6, seed, power) for seed in range(200)]
    squared = [float((weight @ covariance @ weight.T).trace()) for weight in maps]
    assert sum(squared) / len(squared) == pytest.approx(1, rel=0.1)


@settings(max_examples=30)
@given(st.integers(1, 10), st.integers(1, 20), st.integers(0, 10), st.integers(0, 999), st.floats(0, 1))
def test_any_covariance_gives_a_finite_map(channels, width, rank, seed, power):
    factor = torch.randn(channels, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = whitening(factor @ factor.T, width, seed, power)
    assert weight.shape == (width, channels)
    assert weight.isfinite().all()
    assert torch.equal(weight, whitening(factor @ factor.T, width, seed, power))


def test_statistics_are_of_the_pyramid_at_the_finest_resolution():
    generator = torch.Generator().manual_seed(0)
    pyramid = [torch.randn(6, 3, 8, 8, generator=generator), torch.randn(6, 2, 4, 4, generator=generator)]
    statistics = PatchStatistics()
    for start in (0, 2, 4):
        statistics.update([level[start : start + 2] for level in pyramid])
    resized = torch.nn.functional.interpolate(pyramid[1], (8, 8), mode="bilinear")
    patches = torch.cat([pyramid[0], resized], dim=1).permute(0, 2, 3, 1).reshape(-1, 5)
    mean, covariance = statistics.moments(Processes())
    torch.testing.assert_close(mean, patches.double().mean(dim=0))
    torch.testing.assert_close(covariance, covariance_of(patches))


def test_descriptor_starts_whitened_and_keeps_its_coordinates():
    descriptor = PatchDescriptor([4, 2], 6, seed=1)
    coordinates = descriptor.weight[:, -2:].clone()
    generator = torch.Generator().manual_seed(0)
    points = 3 + torch.randn(2000, 6, generator=generator) * torch.tensor([10.0, 5, 1, 1, 1, 1])
    descriptor.start_whitened(points.mean(dim=0), covariance_of(points), seed=1, power=1)
    assert torch.equal(descriptor.weight[:, -2:], coordinates)
    assert (points * descriptor.feature_scale).var(dim=0).mean().sqrt() == pytest.approx(0.1, rel=0.01)
    described = descriptor([points[:, :4, None, None], points[:, 4:, None, None]]).flatten(1).detach()
    variances = covariance_of(described).diagonal()
    assert variances.max() / variances.min() < 1.5
    assert variances.sum() == pytest.approx(1, rel=1e-4)
    mean = points.mean(dim=0)[None, :, None, None]
    coordinate_part = descriptor([mean[:, :4], mean[:, 4:]]).flatten()
    torch.testing.assert_close(described.mean(dim=0), coordinate_part.detach(), atol=1e-4, rtol=0)
