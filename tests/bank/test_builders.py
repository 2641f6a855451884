import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_cfa.bank.builders import EmaBank, KMeansBank, MeanBank, k_means


def images(count: int, patches: int = 20, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, patches, width, generator=torch.Generator().manual_seed(seed))


def build(builder, descriptors, batches=1):
    for batch in descriptors.chunk(batches):
        builder.update(batch)
    return builder.centers()


def test_mean_bank_is_the_mean_of_each_position():
    descriptors = images(7)
    torch.testing.assert_close(build(MeanBank(1, 0), descriptors, 3), descriptors.mean(dim=0))


def test_ema_bank_follows_the_paper():
    descriptors = images(5)
    centers = descriptors[0]
    for number, image in enumerate(descriptors[1:], start=2):
        nearest = image[torch.cdist(centers, image).argmin(dim=1)]
        centers = (1 - 1 / number) * centers + 1 / number * nearest
    torch.testing.assert_close(build(EmaBank(1, 0), descriptors, 2), centers)


def test_beta_weighs_the_newest_image():
    descriptors = images(3)
    centers = descriptors[0]
    for image in descriptors[1:]:
        centers = 0.7 * centers + 0.3 * image[torch.cdist(centers, image).argmin(dim=1)]
    torch.testing.assert_close(build(EmaBank(1, 0, beta=0.3), descriptors), centers)


@pytest.mark.parametrize("kind", [KMeansBank, MeanBank, EmaBank])
@pytest.mark.parametrize("gamma_c", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 9])
def test_size_depends_on_gamma_c_and_the_patches_only(kind, gamma_c, count):
    assert build(kind(gamma_c, 0), images(count)).shape == (20 // gamma_c, 6)


@pytest.mark.parametrize(("count", "centers"), [(9, 50), (2, 40)])
def test_k_means_gives_more_centers_than_an_image_has_patches_if_there_are_enough(count, centers):
    assert build(KMeansBank(0.4, 0), images(count)).shape == (centers, 6)


@settings(max_examples=25)
@given(shares=st.lists(st.integers(1, 5), min_size=2, max_size=4), seed=st.integers(0, 999))
def test_uneven_shares_of_several_processes_merge_to_the_mean_exactly(shares, seed):
    descriptors = images(sum(shares), seed=seed)
    builders = [MeanBank(1, 0) for _ in shares]
    for builder, share in zip(builders, descriptors.split(shares), strict=True):
        builder.update(share)
    states = [(torch.tensor(builder.count), builder.state.clone()) for builder in builders]
    for builder in builders:
        totals = iter([sum(count for count, _ in states), sum(state for _, state in states)])
        builder.merge(lambda _, totals=totals: next(totals))
        torch.testing.assert_close(builder.centers(), descriptors.mean(dim=0))


def test_ema_of_several_processes_starts_from_the_first_ones_image():
    descriptors = images(6)
    first = EmaBank(1, 0)
    first.update(descriptors[:3])
    other = EmaBank(1, 0, broadcast=lambda _: descriptors[0], is_first=False)
    other.update(descriptors[3:])
    nearest = descriptors[3][torch.cdist(descriptors[0], descriptors[3]).argmin(dim=1)]
    lone = EmaBank(1, 0, broadcast=lambda _: descriptors[0], is_first=False)
    lone.update(descriptors[3:4])
    torch.testing.assert_close(lone.state, nearest)
    assert (first.count, other.count) == (3, 3)


def test_images_of_another_size_are_refused():
    builder = MeanBank(1, 0)
    builder.update(images(2))
    with pytest.raises(ValueError, match="one has 12 patches and those before it have 20"):
        builder.update(images(1, patches=12))


def test_kmeans_bank_finds_the_modes_wherever_they_lie_in_the_images():
    modes = 10 * torch.eye(6)[:4]
    generator = torch.Generator().manual_seed(0)
    descriptors = modes[torch.randint(4, (60, 20), generator=generator)] + 0.01 * images(60)
    centers = build(KMeansBank(1, seed=0), descriptors, 7)
    assert torch.cdist(modes, centers).min(dim=1).values.max() < 0.1


def test_kmeans_bank_holds_a_bounded_sample_of_all_images_alike():
    builder = KMeansBank(1, seed=0)
    for number in range(400):
        builder.update(torch.full((1, 20, 1), float(number)))
    sample = builder._gather()
    assert 300 < len(sample) <= 32 * 20
    assert 150 < sample.mean() < 250
    assert len(sample.unique()) > 250


def test_kmeans_bank_puts_the_samples_of_all_processes_together():
    descriptors = images(7)
    builders = [KMeansBank(2, 0, processes=2, process=process) for process in range(2)]
    for builder, share in zip(builders, descriptors.split(4), strict=True):
        builder.update(share)
    parts = [builder._gather() for builder in builders]
    sizes, expected = [len(part) for part in parts], torch.cat(parts)
    for builder in builders:
        totals = iter([torch.tensor(sizes), expected, torch.tensor(7)])
        builder.merge(lambda own, totals=totals: next(totals))
        assert torch.equal(builder.state, expected)
        assert builder.count == 7
    assert torch.equal(builders[0].centers(), builders[1].centers())


def test_k_means_depends_on_its_seed_alone_and_beats_random_centers():
    points = images(1, patches=400)[0]
    torch.manual_seed(0)
    first = k_means(points, 40, seed=1)
    torch.manual_seed(1)
    assert torch.equal(first, k_means(points, 40, seed=1))
    inertia = torch.cdist(points, first).min(dim=1).values.square().sum()
    assert inertia < 0.9 * torch.cdist(points, points[:40]).min(dim=1).values.square().sum()
    assert math.isfinite(inertia)
