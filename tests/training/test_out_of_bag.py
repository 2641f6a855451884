import pytest
import torch

from anomalib_cfa.features import PatchFeatures
from anomalib_cfa.processes import Processes
from anomalib_cfa.torch_model import CfaModel
from anomalib_cfa.training.out_of_bag import OutOfBagScores


def network(score="nearest", centers=60):
    torch.manual_seed(0)
    model = CfaModel(PatchFeatures("test_resnet.r160_in1k", pre_trained=False), search="exact", score=score).eval()
    sources = torch.stack([torch.arange(centers) % 3, torch.zeros(centers), torch.zeros(centers)], dim=1)
    model.assign_bank(torch.randn(centers, model.descriptor.width), sources)
    return model


def image_scores(scores):
    """Those of all images, nan where an image was not seen."""
    scores.worst(Processes())
    return scores._scores


def patches_of(model, images, seed=1):
    return torch.randn(images, 4, 4, model.descriptor.width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 6], ids=["whole bank searched at times", "most among the targets"])
def test_a_patch_is_measured_to_the_nearest_centre_that_is_not_its_images_own(k):
    model, names = network(), ["a", "b", "c"]
    scores, patches = OutOfBagScores(model, names, names), patches_of(model, 3)
    scores.start_batch(["c", "a", "b"], (32, 32))
    for block in patches.split(2):
        scores.update(*model.memory_bank.nearest(block, k), block)
    owners = model.memory_bank.sources[:, 0]
    distances = torch.cdist(patches.double().flatten(1, 2), model.memory_bank.centers.double())
    expected = [distances[batch][:, owners != image].amin(dim=1).amax() for batch, image in ((1, 0), (2, 1), (0, 2))]
    torch.testing.assert_close(image_scores(scores), torch.stack(expected).float())


def test_an_image_that_a_data_set_holds_twice_is_not_fitted_by_its_copy():
    model = network()
    names = ["a", "b", "a"]
    scores, patches = OutOfBagScores(model, names, names), patches_of(model, 1)
    scores.start_batch(["a"], (32, 32))
    scores.update(*model.memory_bank.nearest(patches, 6), patches)
    others = model.memory_bank.centers[model.memory_bank.sources[:, 0] == 1]
    expected = torch.cdist(patches.flatten(0, 2), others).amin(dim=1).amax()
    torch.testing.assert_close(image_scores(scores)[2], expected)


@pytest.mark.parametrize(
    ("bank_paths", "batch"),
    [([], ["a"]), (["x", "y", "z"], ["a"]), (["a"], ["a"])],
    ids=["the bank's images are not known", "the bank is of other images", "sources beyond the images"],
)
def test_where_no_centre_is_known_to_be_its_own_all_count(bank_paths, batch):
    model = network()
    scores, patches = OutOfBagScores(model, bank_paths, ["a", "b"]), patches_of(model, 1)
    scores.start_batch(batch, (32, 32))
    scores.update(*model.memory_bank.nearest(patches, 6), patches)
    expected = torch.cdist(patches.flatten(0, 2), model.memory_bank.centers).amin(dim=1).amax()
    torch.testing.assert_close(image_scores(scores)[0], expected)


def test_images_that_are_not_listed_or_not_named_are_passed_over():
    model = network()
    scores, patches = OutOfBagScores(model, ["a"], ["a"]), patches_of(model, 1)
    for paths in (["elsewhere"], None):
        scores.start_batch(paths, (32, 32))
        scores.update(*model.memory_bank.nearest(patches, 6), patches)
    assert image_scores(scores).isnan().all()


def test_a_single_image_has_nothing_to_be_compared_with():
    model = network()
    model.memory_bank.sources.zero_()
    scores, patches = OutOfBagScores(model, ["a"], ["a"]), patches_of(model, 1)
    scores.start_batch(["a"], (32, 32))
    scores.update(*model.memory_bank.nearest(patches, 6), patches)
    assert scores.worst(Processes()) == []


def test_processes_put_their_images_together():
    model, names = network(), [str(number) for number in range(20)]
    parts = [OutOfBagScores(model, names, names) for _ in range(2)]
    for number, name in enumerate(names + names[:1]):  # a sampler fills up with the first
        part = parts[number % 2]
        patches = patches_of(model, 1, seed=int(name)) * (20 if name == "13" else 1)
        part.start_batch([name], (32, 32))
        part.update(*model.memory_bank.nearest(patches, 6), patches)
    sent = []
    for part in parts:
        part.worst(Processes(sum=lambda tensor: sent.append(tensor) or tensor))
    worst = [part.worst(Processes(sum=lambda _: sum(sent))) for part in parts]
    assert worst[0] == worst[1]
    assert [path for path, _ in worst[0]] == ["13"]


@pytest.mark.parametrize("score", ["local", "calibrated", "nearest", "softmin"])
def test_predictions_are_what_the_model_says_of_new_images_once_it_is_calibrated(score):
    model, patches = network(score), patches_of(network(score), 3)
    scores = OutOfBagScores(model, ["x", "y", "z"], ["a", "b", "c"])  # no centre is their own
    scores.start_batch(["a", "b", "c"], (32, 32))
    scores.update(*model.memory_bank.nearest(patches, 6), patches)
    model.calibrate(*model.memory_bank.nearest(patches, 6))
    model.finish_calibration(Processes())
    nearest = model.memory_bank.nearest(patches, model.scored_neighbors)
    maps = model.smooth(model.score_distances(*nearest), (32, 32))
    (predictions,) = scores.predictions()
    torch.testing.assert_close(predictions.anomaly_map, maps.shown)
    torch.testing.assert_close(predictions.pred_score, maps.of_image.amax(dim=(1, 2)))


def test_a_single_image_is_not_predicted():
    model = network()
    model.memory_bank.sources.zero_()
    scores, patches = OutOfBagScores(model, ["a"], ["a"]), patches_of(model, 1)
    scores.start_batch(["a"], (32, 32))
    scores.update(*model.memory_bank.nearest(patches, 6), patches)
    assert [len(batch.pred_score) for batch in scores.predictions()] == [0]


def test_an_epoch_predicts_its_own_images_only():
    model = network()
    scores, patches = OutOfBagScores(model, ["a", "b"], ["a", "b"]), patches_of(model, 1)
    for name in ("a", "b"):
        scores.start_epoch()
        scores.start_batch([name], (32, 32))
        scores.update(*model.memory_bank.nearest(patches, 6), patches)
    assert len(list(scores.predictions())) == 1


def test_images_of_which_no_centre_is_known_to_be_are_told():
    model = network()
    names = ["a", "b", "c"]
    assert OutOfBagScores(model, names, ["a", "b"]).knows_owners
    assert not OutOfBagScores(model, names, ["moved/a", "moved/b"]).knows_owners
    model.memory_bank.assign(model.memory_bank.centers)
    assert OutOfBagScores(model, names, ["moved/a", "moved/b"]).knows_owners  # no centre is anyone's own
