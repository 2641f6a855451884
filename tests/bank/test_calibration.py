import copy
import pickle

import pytest
import torch

from anomalib_cfa.bank.calibration import CenterCalibration


def calibrated(distances, indices, centers):
    calibration = CenterCalibration()
    calibration.reset(centers)
    for batch, where in zip(distances.chunk(3), indices.chunk(3), strict=True):
        calibration.update(batch, where)
    calibration.finish()
    return calibration


def test_scores_count_deviations_from_what_is_usual_at_the_center():
    generator = torch.Generator().manual_seed(0)
    near = 1 + 0.1 * torch.randn(50000, generator=generator)
    far = 4 + 0.5 * torch.randn(50000, generator=generator)
    distances, indices = torch.cat([near, far]), torch.arange(2).repeat_interleave(50000)
    calibration = calibrated(distances, indices, centers=2)
    scores = calibration(torch.tensor([1.2, 1.2, 5.0]), torch.tensor([0, 1, 1]))
    torch.testing.assert_close(scores, torch.tensor([2.0, -5.6, 2.0]), rtol=0.05, atol=0.05)


def test_the_patches_of_neighbors_count_too():
    distances, indices = torch.tensor([1.0, 3.0, 5.0, 9.0]).repeat(500), torch.tensor([0, 0, 1, 1]).repeat(500)
    calibration = CenterCalibration()
    calibration.reset(2)
    calibration.update(distances, indices)
    calibration.finish(neighbors=torch.tensor([[0, 1], [1, 1]]))
    mean, deviation = distances.mean().item(), distances.std(correction=0).item()
    scores = calibration(torch.tensor([2.0, 2.0, 8.0]), torch.tensor([0, 1, 1]))
    expected = torch.tensor([(2 - mean) / deviation, (2 - 7) / 2, (8 - 7) / 2])
    torch.testing.assert_close(scores, expected, rtol=0.02, atol=0.02)


def test_a_center_of_few_patches_leans_on_all():
    generator = torch.Generator().manual_seed(0)
    distances = torch.cat([1 + torch.rand(1000, generator=generator), torch.tensor([50.0])])
    indices = torch.cat([torch.zeros(1000, dtype=torch.long), torch.ones(1, dtype=torch.long)])
    calibration = calibrated(distances, indices, centers=3)
    assert calibration.mean[0] == pytest.approx(1.5, abs=0.05)
    assert 1.5 < calibration.mean[1] < 10
    assert calibration.mean[2] == pytest.approx(distances.mean().item(), rel=1e-5)
    assert (calibration.deviation > 0).all()


def test_processes_that_share_sums_agree_with_one_that_saw_all():
    generator = torch.Generator().manual_seed(0)
    distances, indices = torch.rand(700, generator=generator), torch.randint(5, (700,), generator=generator)
    whole = calibrated(distances, indices, centers=5)
    shares = []
    for batch, where in zip(distances.split(300), indices.split(300), strict=True):
        share = CenterCalibration()
        share.reset(5)
        share.update(batch, where)
        shares.append(share)
    total = sum(share._sums for share in shares)
    for share in shares:
        share.finish(total=lambda _: total)
        torch.testing.assert_close(share.mean, whole.mean)
        torch.testing.assert_close(share.deviation, whole.deviation)


def test_distances_count_as_they_are_before_any_normal_patch_was_seen():
    calibration = CenterCalibration()
    calibration.reset(4)
    calibration.finish()
    assert torch.equal(calibration(torch.tensor([2.0, 3.0]), torch.tensor([0, 3])), torch.tensor([2.0, 3.0]))


def test_constant_distances_give_finite_scores():
    calibration = calibrated(torch.full((30,), 2.0), torch.zeros(30, dtype=torch.long), centers=2)
    assert calibration(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([0, 1, 0])).isfinite().all()


def test_restored_with_its_state_and_copied_without_its_sums():
    calibration = calibrated(torch.rand(90), torch.randint(6, (90,)), centers=6)
    restored = CenterCalibration()
    restored.load_state_dict(calibration.state_dict())
    assert torch.equal(restored.mean, calibration.mean)
    for copied in (copy.deepcopy(calibration), pickle.loads(pickle.dumps(calibration))):
        assert torch.equal(copied.deviation, calibration.deviation)
        copied.update(torch.rand(3), torch.zeros(3, dtype=torch.long))
        assert copied._sums[0].sum() == 3
