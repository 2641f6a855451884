import plain
import pytest
import torch
from anomalib.models.components import GaussianBlur2d
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from anomalib_cfa.anomaly_map import AnomalyMapGenerator, average_views, central_view, softmin_scores


def test_scores_equal_the_formula():
    squared = torch.rand(50, 3).sort(dim=1).values
    torch.testing.assert_close(softmin_scores(squared.sqrt()).double(), plain.scores(squared.double()))


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_map_is_upsampled_and_smoothed_as_one_two_dimensional_gaussian_would(size):
    scores = torch.rand(2, 8, 10)
    expected = GaussianBlur2d(sigma=4)(F.interpolate(scores[:, None], size, mode="bilinear")).squeeze(1)
    torch.testing.assert_close(AnomalyMapGenerator(4.0)(scores, size), expected, rtol=1e-5, atol=1e-6)


def test_the_mode_in_which_a_size_is_first_seen_does_not_matter_later():
    scores, size = torch.rand(1, 11, 13, requires_grad=True), (83, 97)
    with torch.inference_mode(), torch.autocast("cpu"):
        AnomalyMapGenerator(3.0)(scores, size)
    anomaly_map = AnomalyMapGenerator(3.0)(scores, size)
    anomaly_map.sum().backward()
    with torch.no_grad():
        expected = GaussianBlur2d(sigma=3)(F.interpolate(scores[:, None], size, mode="bilinear")).squeeze(1)
    torch.testing.assert_close(anomaly_map.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigma", [1e-300, 2.0])
def test_constant_scores_stay_constant(sigma):
    torch.testing.assert_close(
        AnomalyMapGenerator(sigma)(torch.full((1, 4, 4), 3.0), (32, 32)), torch.full((1, 32, 32), 3.0)
    )


def test_smallest_image_that_is_promised_works():
    generator = AnomalyMapGenerator(4.0)
    side = generator.min_image_size
    assert generator(torch.rand(1, 2, 2), (side, side)).isfinite().all()


def test_the_central_view_of_256_pixels_is_the_papers_224():
    image = torch.arange(256 * 256).reshape(256, 256)
    assert torch.equal(central_view(image), image[16:240, 16:240])


@given(height=st.integers(8, 70), width=st.integers(8, 70))
def test_the_views_are_averaged_where_both_see_the_image(height, width):
    whole = torch.zeros(1, height, width)
    central = 2 * torch.ones_like(central_view(whole))
    averaged = average_views(whole, central)
    assert averaged.shape == whole.shape
    assert (central_view(averaged) == 1).all()
    assert averaged.sum() == central.numel()
