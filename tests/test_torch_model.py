import plain
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from anomalib_cfa.anomaly_map import average_views, central_view
from anomalib_cfa.features import PatchFeatures
from anomalib_cfa.loss import NU, CfaLoss
from anomalib_cfa.processes import ALONE
from anomalib_cfa.torch_model import CfaModel
from anomalib_cfa.training.gradient_blocks import sum_over_blocks

BACKBONES = ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "mobilenetv3_small_050"]


def built(
    backbone: str, size: tuple[int, int], seed: int = 0, images: int = 2, layers: list[str] | None = None, **options
) -> CfaModel:
    """A model with a memory bank of some random images."""
    generator = torch.Generator().manual_seed(seed)
    features = PatchFeatures(backbone, layers, pre_trained=False, image_size=size, seed=seed)
    model = CfaModel(features, sigma=1.0, seed=seed, **options)
    model.num_nearest_neighbors, model.num_hard_negative_features = 1, 0  # however few centres there are
    model.fit([model.pyramid(torch.randn(images, 3, *size, generator=generator))])
    return model


@settings(max_examples=25)
@example("test_efficientnet", (2, 5), 1, "all", 0.0, "exact", 59)
@given(
    backbone=st.sampled_from(BACKBONES),
    size=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    batch=st.integers(1, 3),
    layers=st.sampled_from([None, "all"]),
    radius=st.floats(0, 1),
    search=st.sampled_from(["exact", "two_level"]),
    seed=st.integers(0, 2**10),
)
def test_a_step_is_that_of_the_plain_formula(backbone, size, batch, layers, radius, search, seed):
    if backbone == "test_vit":  # takes images of its own size only
        size, layers = (5, 5), None
    # The finest of its layers has stride 2, and the whole distance matrix grows with the fourth power of the side.
    scale = 16 if (backbone, layers) == ("test_efficientnet", "all") else 32
    height, width = (scale * side for side in size)
    every = {"test_resnet": ["layer1", "layer2", "layer3"], "test_efficientnet": ["blocks.0.0", "blocks.2.0"]}
    chosen = every.get(backbone) if layers == "all" else None
    options = {"layers": chosen, "radius": radius, "search": search, "gamma_c": 1, "bank": "mean", "whitening": None}
    model = built(backbone, (height, width), seed, **options).train()
    k, j = 2, min(2, len(model.memory_bank.centers) - 2)
    model.num_nearest_neighbors, model.num_hard_negative_features = k, j
    loss = CfaLoss(k, j, alpha=0.1)
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed + 1))
    pyramid = model.pyramid(images)

    def compute(block: list[torch.Tensor]) -> torch.Tensor:
        return len(block[0]) / batch * sum(loss(model.targets(block)[0], model.radius))

    parameters = model.trained_parameters()
    blocks = [[level[i : i + 1] for level in pyramid] for i in range(batch)]
    value = sum_over_blocks(compute, blocks, parameters)
    gradients = torch.autograd.grad(value, parameters)

    double = [parameter.detach().double().requires_grad_() for parameter in parameters]
    described = plain.describe([level.double() for level in pyramid], *double[:2])
    centers = model.memory_bank.centers.double()
    # Of two centres that are as near as each other to float32 either may be found: both formulas take the same.
    found = torch.cat([model.targets(block)[1] for block in blocks])[..., : k + j]
    squared = (described[..., None, :] - centers[found]).square().sum(dim=-1)
    with torch.no_grad():
        if search == "exact":
            nearest = plain.squared_distances(described, centers, k + j)
            torch.testing.assert_close(squared, nearest, rtol=1e-4, atol=1e-7)
        for edge in (radius**2, radius**2 - 0.1):  # where a term begins, its gradient is one or zero
            assume(((squared - edge).abs() > 1e-5 * squared).all())
    expected = plain.loss(squared, double[2], k, j, alpha=0.1, nu=NU)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, double), strict=True):
        scale = theirs.abs().max().item() + 1e-6
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("score", ["nearest", "softmin"])
def test_scores_do_not_cancel_once_the_loss_is_near_zero(score):
    model = built("test_resnet", (64, 64), bank="mean", score=score, images=1, whitening=None)
    pyramid = model.pyramid(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5)))
    with torch.no_grad():  # features far from the origin, in comparison with which distances are small
        model.descriptor.bias += 3
        model.assign_bank(model.describe(pyramid).flatten(0, 2))
        model.num_nearest_neighbors, model.num_hard_negative_features = 3, 3
        model.descriptor.weight += 1e-4 * torch.randn(
            model.descriptor.weight.shape, generator=torch.Generator().manual_seed(6)
        )
    loss, start = CfaLoss(3, 3), None
    optimizer = torch.optim.AdamW(model.trained_parameters(), lr=1e-5)
    for _ in range(20):
        value = sum(loss(model.targets(pyramid)[0], model.radius))
        start = start or value.item()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value < start
    model.eval()
    double = [parameter.detach().double() for parameter in model.descriptor.parameters()]
    described = plain.describe([level.double() for level in pyramid], *double)
    squared = plain.squared_distances(described, model.memory_bank.centers.double(), 3)
    expected = squared[..., 0].sqrt() if score == "nearest" else plain.scores(squared)
    assert expected.max() < 0.01 * described.norm(dim=-1).min()
    torch.testing.assert_close(model.patch_scores(pyramid)[0].double(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("score", ["local", "calibrated", "nearest", "softmin"])
@pytest.mark.parametrize("gamma_d", [1, 3])
def test_patch_scores_are_those_of_the_plain_formulas(score, gamma_d):
    model = built("test_resnet", (64, 96), score=score, gamma_d=gamma_d, search="exact").double().eval()
    model.num_nearest_neighbors = 3
    with torch.no_grad():
        pyramid = model.pyramid(torch.rand(2, 3, 64, 96, dtype=torch.float64))
        of_map, of_image = model.patch_scores(pyramid)
        weight, bias = model.descriptor.affine()
        described = plain.describe(pyramid, weight, bias)
    squared, index = (described[..., None, :] - model.memory_bank.centers).square().sum(dim=-1).sort()
    nearest, index = squared[..., 0].sqrt(), index[..., 0]
    calibrated = (nearest - model.calibration.mean[index]) / model.calibration.deviation[index]
    expected = {
        "local": (nearest, calibrated),
        "calibrated": (calibrated, calibrated),
        "nearest": (nearest, nearest),
        "softmin": (plain.scores(squared[..., :3]),) * 2,
    }
    for found, wanted in zip((of_map, of_image), expected[score], strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-5 * wanted.abs().max().item())


def test_the_score_is_calibrated_by_the_nearest_centre_from_another_place():
    model = built("test_resnet", (64, 64))
    centers = torch.zeros(4, model.descriptor.width)
    model.assign_bank(centers, torch.tensor([[0, 0, 0], [0, 0, 3], [5, 0, 0], [5, 1, 1]]))
    # Patches (0, 0), (0, 1), (0, 2), (1, 0), (1, 1) and (1, 2) of an image, and their three nearest centres.
    indices = torch.tensor([[[[0, 2, 1], [0, 1, 2], [3, 0, 1]], [[1, 2, 0], [3, 3, 3], [2, 0, 3]]]])
    squared = torch.tensor([[[[1.0, 4, 9], [16, 25, 36], [4, 9, 16]], [[49, 64, 81], [100, 121, 144], [1, 2, 3]]]])
    model.calibrate(squared, indices)
    counts, distances, _ = model.calibration._sums
    assert counts.tolist() == [1, 2, 1, 2]
    assert distances.tolist() == [4, 3 + 7, 1, 2 + 12]  # of (1, 1) no centre is from elsewhere: the last counts


@pytest.mark.parametrize(("score", "counted"), [("local", 8), ("calibrated", 1)])
def test_what_is_usual_at_a_centre_is_that_of_its_neighbours(score, counted):
    """The patches of the eight centres nearest to a centre, itself among them, count alike for it."""
    model = built("test_resnet", (64, 96), score=score, search="exact", images=4)
    centers, count = model.memory_bank.centers.double(), len(model.memory_bank.centers)
    generator = torch.Generator().manual_seed(0)
    distances, nearest = torch.rand(500, generator=generator), torch.randint(count, (500,), generator=generator)
    model.calibration.reset(count)
    model.calibration.update(distances, nearest)
    model.finish_calibration(ALONE)
    nearby = torch.cdist(centers, centers).topk(counted, largest=False).indices
    groups = [distances[(nearest[:, None] == around).any(dim=1)].double() for around in nearby]
    expected = torch.stack([(group.sum() + 30 * distances.double().mean()) / (len(group) + 30) for group in groups])
    torch.testing.assert_close(model.calibration.mean.double(), expected, rtol=1e-5, atol=0)
    within = sum(((group - group.mean()) ** 2).sum() for group in groups if len(group)) / sum(map(len, groups))
    scatter = [((group - group.mean()) ** 2).sum() if len(group) else torch.zeros(()).double() for group in groups]
    expected = torch.stack([(s + 30 * within) / (len(group) + 30) for s, group in zip(scatter, groups, strict=True)])
    torch.testing.assert_close(model.calibration.deviation.double(), expected.sqrt(), rtol=1e-4, atol=0)


def test_without_sources_the_nearest_centre_counts():
    model = built("test_resnet", (64, 64), bank="mean", gamma_c=1)
    squared, indices = torch.tensor([1.0, 4, 9]).expand(1, 2, 2, 3), torch.tensor([2, 0, 1]).expand(1, 2, 2, 3)
    nearest, index = model.memory_bank.nearest_elsewhere(squared, indices)
    assert (nearest == 1).all()
    assert (index == 2).all()


@pytest.mark.parametrize("score", ["nearest", "local"])
def test_an_image_scores_the_maximum_of_its_own_map(score):
    model = built("test_resnet", (64, 64), score=score).eval()
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    prediction = model(images)
    of_map, of_image = (
        model.anomaly_map_generator(scores, (64, 64)) for scores in model.patch_scores(model.pyramid(images))
    )
    torch.testing.assert_close(prediction.anomaly_map, of_map)
    torch.testing.assert_close(prediction.pred_score, of_image.amax(dim=(1, 2)))
    assert torch.equal(of_map, of_image) == (score == "nearest")


def test_features_from_anywhere_fit_a_bank():
    model = CfaModel(PatchFeatures("test_resnet", pre_trained=False))
    features = [
        torch.rand(4, count, 8 >> level, 8 >> level) for level, count in enumerate(model.patch_features.channels)
    ]
    model.fit([features])
    assert model.memory_bank.is_built
    assert model.memory_bank.sources[:, 0].max() <= 3
    assert model.patch_scores(features)[0].shape == (4, 8, 8)


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="at least one normal image"):
        CfaModel(PatchFeatures("test_resnet", pre_trained=False)).fit([])


@pytest.mark.parametrize("score", ["nearest", "local"])
def test_a_prediction_is_that_of_both_views(score):
    model = built("test_resnet", (128, 128), score=score)
    images = torch.rand(2, 3, 128, 128)
    with torch.inference_mode():
        both = [model.smooth(model.patch_scores(model.pyramid(view)), view.shape[-2:]) for view in views_of(images)]
        model.center_view = True
        prediction = model(images)
    shown, of_image = map(average_views, *both)
    torch.testing.assert_close(prediction.anomaly_map, shown)
    torch.testing.assert_close(prediction.pred_score, of_image.amax(dim=(1, 2)))
    assert not torch.allclose(prediction.pred_score, both[0].of_image.amax(dim=(1, 2)), rtol=1e-3)


def views_of(images):
    return images, central_view(images)


def test_images_whose_centre_is_too_small_are_refused():
    model = built("test_resnet", (64, 64))
    model.center_view = True
    with pytest.raises(ValueError, match="images must be at least"):
        model(torch.rand(1, 3, 18, 18))


def test_a_batch_is_scored_image_by_image(monkeypatch):
    model = built("test_resnet", (64, 64)).eval()
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    whole = model(images)
    monkeypatch.setattr("anomalib_cfa.torch_model._BLOCK_BYTES", 1)
    for ours, theirs in zip(model(images), whole, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)


def test_batches_that_can_be_walked_over_once_are_refused():
    model = CfaModel(PatchFeatures("test_resnet.r160_in1k", pre_trained=False)).eval()
    with pytest.raises(TypeError, match=r"pyramids must be walked over several times.*but is a generator"):
        model.fit(model.pyramid(torch.rand(2, 3, 64, 64)) for _ in range(2))


def test_a_backbone_without_its_pre_trained_weights_does_not_run():
    features = PatchFeatures("test_resnet.r160_in1k")
    with pytest.raises(RuntimeError, match=r"call load_weights\(\) first"):
        features(torch.rand(1, 3, 64, 64))
