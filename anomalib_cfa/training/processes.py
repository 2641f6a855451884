"""The processes that share a fit: who they are, and how they put their parts together."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lightning.pytorch.strategies import Strategy
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """By default a single process.

    Attributes:
        rank: Which of them this is, from 0.
        count: How many there are.
        sum: Sums a tensor over all of them.
        broadcast: Hands the first one's tensor to all.
    """

    rank: int = 0
    count: int = 1
    sum: Callable[[Tensor], Tensor] = lambda tensor: tensor
    broadcast: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @classmethod
    def of(cls, strategy: Strategy) -> "Processes":
        """The processes of a trainer's strategy."""
        return cls(
            rank=getattr(strategy, "global_rank", 0),
            count=getattr(strategy, "world_size", 1),
            sum=partial(strategy.reduce, reduce_op="sum"),
            broadcast=strategy.broadcast,
        )


ALONE = Processes()
