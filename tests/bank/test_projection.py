import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalib_cfa.bank.projection import PatchGrid, PyramidProjection, bands


def _levels(shapes, channels, batch=2):
    return [torch.rand(batch, width, *shape) for width, shape in zip(channels, shapes, strict=True)]


@pytest.mark.parametrize(
    "shapes", [[(8, 12), (4, 6), (2, 3)], [(9, 7), (5, 4)], [(6, 5)], [(6, 5), (6, 5)], [(4, 1), (2, 1)]]
)
def test_a_projection_is_the_coord_conv_of_the_plain_formula(shapes):
    channels = [3, 5, 7][: len(shapes)]
    pyramid = _levels(shapes, channels)
    weight, bias = torch.randn(11, sum(channels) + 2), torch.randn(11)
    if shapes[0][1] == 1:  # of a single column x is 0 for us, and -1 for torch's linspace
        weight[:, -1] = 0
    of_features, of_coordinates = weight.split([sum(channels), 2], dim=1)
    projection = PyramidProjection(of_features.split(channels, dim=1), of_coordinates, bias)
    maps = [level.permute(0, 2, 3, 1) for level in pyramid]
    expected = plain.describe([level.double() for level in pyramid], weight.double(), bias.double())
    torch.testing.assert_close(projection(maps, PatchGrid.of(maps)).double(), expected, rtol=1e-5, atol=1e-5)


@given(
    channels=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    width=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_bands_turn_all_alike_and_read_coarse_levels_alone(channels, width, seed):
    torch.manual_seed(seed)
    weights = [torch.randn(width, level, dtype=torch.float64) for level in channels]
    other = torch.randn(width, 4, dtype=torch.float64)
    parts = bands(weights, [other])
    turned = [
        torch.cat(
            [torch.zeros(len(rest), channels[level]) if part[level] is None else part[level] for part, (rest,) in parts]
        )
        for level in range(len(channels))
    ]
    joined, turned = torch.cat([*weights, other], 1), torch.cat([*turned, torch.cat([rest for _, (rest,) in parts])], 1)
    torch.testing.assert_close(turned.T @ turned, joined.T @ joined)
    for band, (part, _) in enumerate(parts):
        assert [weight is None for weight in part[: band + 1]] == [True] * band + [False]
