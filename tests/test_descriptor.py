import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_cfa.descriptor import PatchDescriptor

sizes = st.integers(1, 9)


@settings(max_examples=50)
@given(
    channels=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    width=st.integers(1, 7),
    size=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_equals_concatenating_and_convolving(channels, width, size, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    descriptor = PatchDescriptor(channels, width, seed)
    pyramid = [
        torch.randn(batch, count, max(size[0] >> level, 1), max(size[1] >> level, 1), generator=generator)
        for level, count in enumerate(channels)
    ]
    weights = torch.randn(batch, *size, width, generator=generator)

    described = descriptor(pyramid)
    gradient = torch.autograd.grad((described * weights).sum(), list(descriptor.parameters()))

    double = [parameter.detach().double().requires_grad_() for parameter in descriptor.parameters()]
    expected = plain.describe([level.double() for level in pyramid], *double)
    expected_gradient = torch.autograd.grad((expected * weights).sum(), double)

    torch.testing.assert_close(described.double(), expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradient, expected_gradient, strict=True):
        scale = theirs.abs().max().item() + 1e-6
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * scale)


def test_start_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = PatchDescriptor([4, 8], 6, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = PatchDescriptor([4, 8], 6, seed=3)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.weight, PatchDescriptor([4, 8], 6, seed=4).weight)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
def test_a_single_row_or_column_of_patches_is_finite(size):
    assert PatchDescriptor([3], 4)([torch.rand(1, 3, *size)]).isfinite().all()


def test_output_is_contiguous_patches_by_channels():
    described = PatchDescriptor([3, 5], 4)([torch.rand(2, 3, 8, 6), torch.rand(2, 5, 4, 3)])
    assert described.shape == (2, 8, 6, 4)
    assert described.is_contiguous()


def test_an_export_leaves_the_weights_to_what_follows():
    descriptor, pyramid = PatchDescriptor([4], width=4), [torch.rand(1, 4, 3, 3)]
    with torch.no_grad():
        with descriptor.exportable():
            before = torch.export.export(descriptor, (pyramid,)).module()(pyramid)
        descriptor.weight.mul_(2)
        descriptor.bias.mul_(2)
        after = torch.export.export(descriptor, (pyramid,)).module()(pyramid)
        torch.testing.assert_close(after, 2 * before)
