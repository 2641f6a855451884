"""Gradients block by block: a step over a large batch in the memory, and the caches, of a small one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Block = TypeVar("Block")


def sum_over_blocks(
    compute: Callable[[Block], Tensor], blocks: Iterable[Block], parameters: Sequence[Tensor]
) -> Tensor:
    """Sum a differentiable function over blocks, and never hold more than one block's graph.

    Each block's gradient is taken as soon as its value, a scalar, is there; it flows to the parameters, leaves of the
    graph, alone. Backward only scales what was summed up, so the result can be used as if the blocks had been computed
    at once, once.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> total = sum_over_blocks(lambda block: (weight * block).sum(), torch.ones(6).split(2), [weight])
        >>> total.backward()
        >>> total.item(), weight.grad.item()
        (12.0, 6.0)
    """
    if not torch.is_grad_enabled():
        return torch.stack([compute(block) for block in blocks]).sum()
    total: Tensor = _SumOverBlocks.apply(compute, blocks, *parameters)
    return total


class _SumOverBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[[Block], Tensor], blocks: Iterable[Block], *parameters: Tensor) -> Tensor:
        values, gradients = [], [torch.zeros_like(parameter) for parameter in parameters]
        for block in blocks:
            with torch.enable_grad():
                value = compute(block)
                new = torch.autograd.grad(value, parameters, materialize_grads=True)
            values.append(value.detach())
            for gradient, addend in zip(gradients, new, strict=True):
                gradient.add_(addend)
        ctx.save_for_backward(*gradients)
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * gradient for gradient in ctx.saved_tensors)
