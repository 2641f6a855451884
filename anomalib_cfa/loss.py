"""Coupled-hypersphere loss: attraction to the nearest centres, repulsion from the hard negatives behind them."""

import torch
from torch import Tensor, nn

NU = 1e-3


class CfaLoss(nn.Module):
    r"""Soft-boundary loss of the coupled hyperspheres (paper, section III-C).

    With :math:`\mathcal{D}_i` a patch's squared distance to its i-th nearest centre, averaged over all patches:

    - attraction: mean over i = 1..K of :math:`\max(0, \mathcal{D}_i - r^2)`
    - repulsion: mean over i = K+1..K+J of :math:`\max(0, r^2 - \mathcal{D}_i - \alpha)`

    Both are divided by :math:`\nu` = 0.001, as in the authors' code. Repulsion and its gradient are zero until
    :math:`r^2 > \alpha`.

    Args:
        num_nearest_neighbors: K, the centres that attract a patch.
        num_hard_negative_features: J, the centres behind them that repel it.
        alpha: Margin between the two hyperspheres.

    Example:
        >>> loss = CfaLoss(num_nearest_neighbors=1, num_hard_negative_features=1, alpha=0.1)
        >>> loss(torch.tensor([[0.5, 0.6]]), torch.tensor(1.0))
        (tensor(0.), tensor(300.0000))
    """

    def __init__(self, num_nearest_neighbors: int = 3, num_hard_negative_features: int = 3, alpha: float = 0.1) -> None:
        super().__init__()
        self.num_nearest_neighbors = num_nearest_neighbors
        self.num_hard_negative_features = num_hard_negative_features
        self.alpha = alpha

    def forward(self, squared_distances: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Attraction and repulsion, each a scalar; their sum is the loss.

        Args:
            squared_distances: Squared distances to the K + J nearest centres or more, nearest first, of shape (..., k).
            radius: The hyperspheres' radius r, a scalar.
        """
        targets = self.num_nearest_neighbors + self.num_hard_negative_features
        attracting, repelling = squared_distances[..., :targets].tensor_split([self.num_nearest_neighbors], dim=-1)
        attraction = torch.relu(attracting - radius**2).mean()
        repulsion = torch.relu(radius**2 - repelling - self.alpha).mean() if repelling.numel() else radius.new_zeros(())
        return attraction / NU, repulsion / NU
