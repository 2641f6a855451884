import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_cfa.training.gradient_blocks import sum_over_blocks


@settings(max_examples=30)
@given(rows=st.integers(1, 20), size=st.integers(1, 7), scale=st.floats(-4, 4), seed=st.integers(0, 2**16))
def test_value_and_gradient_are_those_of_all_at_once(rows, size, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(rows, 3, generator=generator)
    weight = torch.randn(3, generator=generator, requires_grad=True)
    bias = torch.randn((), generator=generator, requires_grad=True)

    def compute(block: torch.Tensor) -> torch.Tensor:
        return torch.relu(block @ weight + bias).square().sum()

    expected = compute(data)
    total = sum_over_blocks(compute, data.split(size), [weight, bias])
    torch.testing.assert_close(total, expected)
    expected_gradients = torch.autograd.grad(scale * expected, [weight, bias])
    for ours, theirs in zip(torch.autograd.grad(scale * total, [weight, bias]), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_no_more_than_one_block_has_a_graph():
    weight = torch.ones((), requires_grad=True)
    alive = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            alive.append(True)
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.pop()
            return grad

    def compute(block: torch.Tensor) -> torch.Tensor:
        assert not alive
        return Watched.apply(weight * block).sum()

    sum_over_blocks(compute, torch.ones(6).split(2), [weight]).backward()
    assert weight.grad == 6


def test_a_parameter_that_has_no_part_gets_no_gradient():
    weight, idle = torch.ones((), requires_grad=True), torch.ones((), requires_grad=True)
    sum_over_blocks(lambda block: (weight * block).sum(), [torch.ones(2)], [weight, idle]).backward()
    assert weight.grad == 2
    assert idle.grad == 0


def test_without_gradients_it_is_a_sum():
    weight = torch.ones((), requires_grad=True)
    with torch.no_grad():
        total = sum_over_blocks(lambda block: (weight * block).sum(), torch.ones(5).split(2), [weight])
    assert total == 5
    assert not total.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reaches_the_blocks(dtype):
    weight = torch.ones(3, 3, requires_grad=True)
    seen = []

    def compute(block: torch.Tensor) -> torch.Tensor:
        product = block @ weight
        seen.append(product.dtype)
        return product.float().sum()

    with torch.autocast("cpu", dtype):
        total = sum_over_blocks(compute, torch.ones(4, 3).split(2), [weight])
    total.backward()
    assert seen == [dtype, dtype]
    assert torch.equal(weight.grad, torch.full((3, 3), 4.0))
