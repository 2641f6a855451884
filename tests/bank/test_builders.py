import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_cfa.bank.builders import EmaBank, KMeansBank, MeanBank
from anomalib_cfa.bank.sample import PatchSample
from anomalib_cfa.processes import Processes


def images(count: int, height: int = 4, width: int = 5, channels: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


def build(builder, descriptors, batches=1):
    for batch in descriptors.chunk(batches):
        builder.update(batch)
    return builder.centers()[0]


def test_mean_bank_is_the_mean_of_each_position():
    descriptors = images(7)
    torch.testing.assert_close(build(MeanBank(1, 0), descriptors, 3), descriptors.mean(dim=0).flatten(0, 1))


@pytest.mark.parametrize("gamma_c", [1, None])
def test_ema_bank_follows_the_paper(gamma_c):
    descriptors = images(5).flatten(1, 2)
    centers = descriptors[0]
    for number, image in enumerate(descriptors[1:], start=2):
        nearest = image[torch.cdist(centers, image).argmin(dim=1)]
        centers = (1 - 1 / number) * centers + 1 / number * nearest
    torch.testing.assert_close(build(EmaBank(gamma_c, 0), images(5), 2), centers)


@pytest.mark.parametrize("kind", [KMeansBank, MeanBank, EmaBank])
@pytest.mark.parametrize("gamma_c", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 9])
def test_size_depends_on_gamma_c_and_the_patches_only(kind, gamma_c, count):
    assert build(kind(gamma_c, 0), images(count)).shape == (20 // gamma_c, 6)


@pytest.mark.parametrize(("count", "centers"), [(9, 50), (2, 40)])
def test_k_means_gives_more_centers_than_an_image_has_patches_if_there_are_enough(count, centers):
    assert build(KMeansBank(0.4, 0), images(count)).shape == (centers, 6)


def test_without_gamma_c_few_images_make_few_centers(monkeypatch):
    assert len(build(KMeansBank(None, 0), images(3))) == 3 * 20 // 2
    monkeypatch.setattr("anomalib_cfa.bank.builders._CENTERS", 25)
    assert len(build(KMeansBank(None, 0), images(30))) == 25


@settings(max_examples=25)
@given(shares=st.lists(st.integers(1, 5), min_size=2, max_size=4), seed=st.integers(0, 999))
def test_uneven_shares_of_several_processes_merge_to_the_mean_exactly(shares, seed):
    descriptors = images(sum(shares), seed=seed)
    parts = descriptors.split(shares)
    totals = [torch.tensor(sum(shares)), descriptors.flatten(1, 2).double().sum(dim=0)]
    for rank, part in enumerate(parts):
        given_totals = iter(totals)
        builder = MeanBank(1, 0, Processes(rank, len(shares), sum=lambda _, totals=given_totals: next(totals)))
        torch.testing.assert_close(build(builder, part), descriptors.mean(dim=0).flatten(0, 1))


def test_ema_of_several_processes_starts_from_the_first_ones_image():
    descriptors = images(6)
    first = descriptors[0].flatten(0, 1)
    other = EmaBank(1, 0, Processes(rank=1, count=2, broadcast=lambda _: first))
    other.update(descriptors[3:4])
    image = descriptors[3].flatten(0, 1)
    torch.testing.assert_close(other.state, image[torch.cdist(first, image).argmin(dim=1)])
    assert other.count == 1


def test_images_of_another_size_are_refused():
    builder = MeanBank(1, 0)
    builder.update(images(2))
    with pytest.raises(ValueError, match="one has 3 x 4 patches and those before it have 4 x 5"):
        builder.update(images(1, height=3, width=4))


def test_kmeans_bank_finds_the_modes_wherever_they_lie_in_the_images():
    modes = 10 * torch.eye(6)[:4]
    generator = torch.Generator().manual_seed(0)
    descriptors = modes[torch.randint(4, (60, 4, 5), generator=generator)] + 0.01 * images(60)
    centers = build(KMeansBank(1, seed=0), descriptors, 7)
    assert torch.cdist(modes, centers).min(dim=1).values.max() < 0.1


def test_centers_of_k_means_name_the_patches_that_they_came_from():
    descriptors = images(30)
    builder = KMeansBank(1, seed=0)
    for batch in descriptors.split(7):
        builder.update(batch)
    centers, sources = builder.centers()
    image, row, column = sources.long().T
    distances = torch.cdist(centers, descriptors.flatten(0, 2))
    named = (centers - descriptors[image, row, column]).norm(dim=1)
    assert (named <= distances.quantile(0.05, dim=1)).all()  # nearest in the sample, which has no more than an eighth


def test_a_sample_is_bounded_and_holds_all_images_alike():
    sample = PatchSample(640, seed=0, processes=Processes())
    for number in range(400):
        sample.update(torch.full((1, 4, 5, 1), float(number)))
    points, sources = sample.gathered()
    assert 300 < len(points) <= 640
    assert 150 < points.mean() < 250
    assert len(points.unique()) > 250
    assert torch.equal(points[:, 0].int(), sources[:, 0])


def test_centers_of_two_patches_or_fewer_are_patches_not_their_means():
    descriptors = images(3)
    builder = KMeansBank(None, seed=0)
    builder.update(descriptors)
    centers, sources = builder.centers()
    assert len(centers) == 3 * 20 // 2 == len(sources.unique(dim=0))
    image, row, column = sources.long().T
    assert torch.equal(centers, descriptors[image, row, column])


def test_samples_of_all_processes_are_put_together():
    descriptors = images(7)
    shares = [descriptors[0::2], descriptors[1::2]]
    lone = []
    for rank, share in enumerate(shares):
        sample = PatchSample(1000, seed=0, processes=Processes(rank=rank, count=2))
        sample.update(share)
        lone.append((sample._points[: sample._held], sample._sources[: sample._held]))
    sizes = torch.tensor([len(points) for points, _ in lone])
    for rank, share in enumerate(shares):
        totals = iter([sizes, torch.cat([lone[0][0], lone[1][0]]), torch.cat([lone[0][1], lone[1][1]])])
        processes = Processes(rank=rank, count=2, sum=lambda _, totals=totals: next(totals))
        sample = PatchSample(1000, seed=0, processes=processes)
        sample.update(share)
        points, sources = sample.gathered()
        image, row, column = sources.long().T
        assert torch.equal(points, descriptors[image, row, column])
