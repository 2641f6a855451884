import plain
import pytest
import torch
from exporting import fitted, tiny

from anomalib_cfa.anomaly_map import AnomalyMapGenerator, smoothed_resize_weights
from anomalib_cfa.export import network as exported_head
from anomalib_cfa.export.network import ExportedHead, ExportedModel


def _plain_scores(network, pyramid, score):
    """Patch scores by the plain formulas, in float64."""
    descriptor = network.descriptor.double()
    weight = descriptor.weight.detach().clone()
    weight[:, :-2] *= descriptor.feature_scale
    bias = descriptor.bias.detach() - weight[:, :-2] @ descriptor.feature_mean
    described = plain.describe([level.double() for level in pyramid], weight, bias)
    squared, index = (described[..., None, :] - network.memory_bank.centers.double()).square().sum(dim=-1).sort()
    distances = squared.sqrt()
    if score == "softmin":
        return plain.scores(squared[..., : network.num_nearest_neighbors])
    if score == "nearest":
        return distances[..., 0]
    mean, deviation = (
        table.double()[index[..., 0]] for table in (network.calibration.mean, network.calibration.deviation)
    )
    return (distances[..., 0] - mean) / deviation


@pytest.mark.parametrize("score", ["calibrated", "nearest", "softmin"])
@pytest.mark.parametrize("block", [5, 64, 256])
@pytest.mark.parametrize("gamma_d", [1, 3])
def test_the_head_is_the_plain_formula(score, block, gamma_d, monkeypatch):
    monkeypatch.setattr(exported_head, "_BLOCK", block)
    network = fitted(tiny(score=score, gamma_d=gamma_d)).model.eval()
    network.descriptor.feature_mean.uniform_(0, 1)
    network.descriptor.feature_scale.fill_(0.5)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        pyramid = network.patch_features(images)
        head = ExportedHead(network)
        found = head(pyramid, (64, 96))
        scores = _plain_scores(network, pyramid, score)
        expected = network.anomaly_map_generator.double()(scores, (64, 96)).squeeze(1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_small_distances_far_from_the_origin_do_not_cancel():
    network = fitted(tiny(score="nearest")).model.eval()
    with torch.no_grad():
        pyramid = network.patch_features(torch.rand(1, 3, 64, 96))
        network.descriptor.bias.add_(100 * network.descriptor.weight.abs().mean())
        described = network.describe(pyramid).flatten(0, 2)
        network.assign_bank(described[::4] + 1e-3 * described.std() * torch.randn_like(described[::4]))
        distances = ExportedHead(network)._distances
        maps = [level.permute(0, 2, 3, 1) for level in pyramid]
        grid = exported_head.PatchGrid.of(maps)
        own = torch.arange(len(described) // 4).expand(1, 1, 1, -1)
        height, width = maps[0].shape[1:3]
        found = distances(maps, grid, own.expand(1, height, width, -1)[..., :3])
        exact = _plain_scores(network, pyramid, "nearest")
    nearest = torch.cdist(described.double(), network.memory_bank.centers[:3].double()).view(1, height, width, 3)
    assert exact.min() < 1e-2 * nearest.max()
    torch.testing.assert_close(found.double(), nearest, rtol=1e-4, atol=1e-6 * described.abs().max().item() * 10)


def test_weights_of_the_exported_map_are_the_generators():
    generator = AnomalyMapGenerator(sigma=2)
    scores = torch.rand(3, 7, 20)
    for size in [(28, 80), (9, 9), (31, 17)]:
        rows, columns = (smoothed_resize_weights(*sides, generator.kernel) for sides in zip((7, 20), size, strict=True))
        torch.testing.assert_close(rows.T @ scores @ columns, generator(scores, size).squeeze(1))


def test_the_exported_form_is_a_copy():
    network = fitted(tiny()).model.eval()
    images = torch.rand(1, 3, 64, 96)
    exported = ExportedModel(network).eval()
    before = exported(images)
    with torch.no_grad():
        network.descriptor.weight.zero_()
    torch.testing.assert_close(exported(images).anomaly_map, before.anomaly_map)
    assert not torch.allclose(network(images).anomaly_map, before.anomaly_map)
