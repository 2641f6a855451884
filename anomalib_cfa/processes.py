"""The processes that share a fit: who they are, and how they put their parts together."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


@dataclass(frozen=True)
class Processes:
    """By default a single process."""

    rank: int = 0  # which of them this is
    count: int = 1
    sum: Callable[[Tensor], Tensor] = lambda tensor: tensor  # over all of them
    broadcast: Callable[[Tensor], Tensor] = lambda tensor: tensor  # hands the first one's to all

    @classmethod
    def of(cls, trainer: "Trainer") -> "Processes":
        """Those of a trainer."""
        strategy = trainer.strategy
        return cls(
            trainer.global_rank, trainer.world_size, partial(strategy.reduce, reduce_op="sum"), strategy.broadcast
        )


ALONE = Processes()
