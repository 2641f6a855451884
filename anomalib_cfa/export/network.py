"""The network as it is exported: what lies behind the backbone, in a form for runtimes on the production line.

It is the same arithmetic in another order. The centres are ranked through the bank: with the patch descriptor
``q = sum_l up(W_l f_l) + ...`` the product ``c.q`` is ``sum_l up((c.W_l) f_l) + ...``, at each level's own resolution,
a fraction of the operations. The distance to those that lead is then a sum of squared differences, which does not
cancel.
"""

from collections.abc import Sequence

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_cfa.anomaly_map import smoothed_resize_weights, softmin_scores
from anomalib_cfa.bank.projection import PatchGrid, PyramidProjection, bands
from anomalib_cfa.torch_model import CfaModel
from anomalib_cfa.views import average_views, central_view

_BLOCK = 256  # centres that are ranked at a time, which bounds the memory
_SPARE_CANDIDATES = 1  # beyond those asked for, for centres that the ranking cannot tell apart


class ExportedModel(nn.Module):
    """A fitted network for export: images -> anomaly maps and scores. Its weights are copies.

    Args:
        model: The network, with a memory bank.

    Example:
        >>> model = CfaModel("resnet18", pre_trained=False).eval()
        >>> model.assign_bank(torch.rand(16, model.descriptor.width))
        >>> ExportedModel(model)(torch.rand(1, 3, 64, 64)).anomaly_map.shape
        torch.Size([1, 64, 64])
    """

    def __init__(self, model: CfaModel) -> None:
        super().__init__()
        self.patch_features = model.patch_features
        self.head = ExportedHead(model)
        self.center_view = model.center_view

    def forward(self, images: Tensor) -> InferenceBatch:
        """Predict.

        Args:
            images: Pre-processed images of shape (B, 3, H, W).

        Returns:
            Anomaly maps of shape (B, H, W), and the image scores, their maxima, of shape (B,).
        """
        anomaly_map = self._anomaly_map(images)
        if self.center_view:
            anomaly_map = average_views(anomaly_map, self._anomaly_map(central_view(images)))
        return InferenceBatch(pred_score=anomaly_map.amax(dim=(-2, -1)), anomaly_map=anomaly_map)

    def _anomaly_map(self, images: Tensor) -> Tensor:
        anomaly_map: Tensor = self.head(self.patch_features(images), images.shape[-2:])
        return anomaly_map


class ExportedHead(nn.Module):
    """All behind the backbone.

    The forms are those that keep float32 in OpenVINO where it would compute in bfloat16: differences as sums with
    negated tables, no division by what is not a constant, no dimension of size one put in or taken out.

    Args:
        model: The network, with a memory bank.
    """

    scale: Tensor
    shift: Tensor
    smoothing: Tensor

    def __init__(self, model: CfaModel) -> None:
        super().__init__()
        self.score = model.score
        self.neighbors = model.num_nearest_neighbors if model.score == "softmin" else 1

        centers = model.memory_bank.centers.double()
        with torch.no_grad():
            level_weights, coordinate_weight, offset = model.descriptor.affine(torch.float64)
        # The descriptors are centred on the bank: the smaller they are, the less rounding the ranking sees.
        origin = centers.mean(dim=0)
        bias, centers = offset - origin, centers - origin

        self.descriptors = nn.ModuleList()
        parts = bands(level_weights, (coordinate_weight, bias, centers.T))
        for band, (weights, (of_coordinates, of_bias, of_centers)) in enumerate(parts):
            self.descriptors.append(PyramidProjection(weights, of_coordinates, of_bias))
            self.register_buffer(f"negated_centers_{band}", -of_centers.T.float().contiguous())

        self.rankings = nn.ModuleList()
        blocks = -(-len(centers) // _BLOCK)
        for block in range(blocks):
            # Neighbours in the bank fall into different blocks, each of which names its best.
            chosen = centers[block::blocks]
            half_norms = chosen.square().sum(dim=1) / 2
            weights = [-chosen @ weight for weight in level_weights]
            self.rankings.append(PyramidProjection(weights, -chosen @ coordinate_weight, half_norms - chosen @ bias))

        scale = 1 / model.calibration.deviation.double()
        self.register_buffer("scale", scale[:, None].float())
        self.register_buffer("shift", (-model.calibration.mean.double() * scale)[:, None].float())
        self.register_buffer("smoothing", model.anomaly_map_generator.kernel.clone())

    def forward(self, pyramid: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        """Make the anomaly map.

        Args:
            pyramid: Pooled feature maps of shape (B, C_l, h_l, w_l), finest first.
            image_size: Height and width of the map, in pixels.

        Returns:
            Anomaly maps of shape (B, *image_size).
        """
        maps = [level.permute(0, 2, 3, 1) for level in pyramid]
        grid = PatchGrid.of(maps)
        candidates = self._candidates(maps, grid)
        distances = self._distances(maps, grid, candidates)
        scores = self._scores(distances, candidates).flatten(2)
        rows, columns = (
            smoothed_resize_weights(patches, pixels, self.smoothing)
            for patches, pixels in zip(scores.shape[1:], image_size, strict=True)
        )
        anomaly_map: Tensor = rows.T[None] @ scores @ columns[None]
        return anomaly_map

    def _candidates(self, maps: Sequence[Tensor], grid: PatchGrid) -> Tensor:
        """The centres that may be the nearest ones, of shape (B, h, w, K)."""
        values, indices = [], []
        for block, ranking in enumerate(self.rankings):
            ranked: Tensor = ranking(maps, grid)
            value, index = ranked.topk(min(self.neighbors, ranked.shape[-1]), dim=-1, largest=False)
            values.append(value)
            indices.append(index * len(self.rankings) + block)
        if len(values) == 1:
            return indices[0]
        value, index = torch.cat(values, dim=-1), torch.cat(indices, dim=-1)
        count = min(self.neighbors + _SPARE_CANDIDATES, value.shape[-1])
        return index.gather(-1, value.topk(count, dim=-1, largest=False).indices)

    def _distances(self, maps: Sequence[Tensor], grid: PatchGrid, candidates: Tensor) -> Tensor:
        """Distances to the candidates, of their shape."""
        tables = [self.get_buffer(f"negated_centers_{band}") for band in range(len(self.descriptors))]
        descriptors = [project(maps, grid) for project in self.descriptors]
        distances = []
        for candidate in candidates.unbind(dim=-1):
            squared = [
                (part + F.embedding(candidate, table)).square().sum(dim=-1, keepdim=True)
                for part, table in zip(descriptors, tables, strict=True)
            ]
            distances.append(sum(squared[1:], squared[0]).sqrt())
        return torch.cat(distances, dim=-1)

    def _scores(self, distances: Tensor, candidates: Tensor) -> Tensor:
        """Scores of shape (B, h, w, 1)."""
        distances, order = distances.topk(self.neighbors, dim=-1, largest=False)
        if self.score == "softmin":
            return softmin_scores(distances)[..., None]
        if self.score == "calibrated":
            nearest = candidates.gather(-1, order)[..., 0]
            return distances * F.embedding(nearest, self.scale) + F.embedding(nearest, self.shift)
        return distances
