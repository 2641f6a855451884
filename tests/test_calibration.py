import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalib_cfa import calibration as calibration_module
from anomalib_cfa.calibration import ScoreCalibration


def calibrated(distances, indices, centers, grid=(1, 1), total=lambda tensor: tensor):
    calibration = ScoreCalibration()
    calibration.reset(centers, grid)
    for batch, where in zip(distances.chunk(3), indices.chunk(3), strict=True):
        calibration.update(batch, where)
    calibration.finish(total)
    return calibration


def as_images(values, count=1):
    """Patches in no particular place: as images of one row."""
    return values.view(count, 1, -1)


def test_scores_count_deviations_from_what_is_usual_at_the_center():
    generator = torch.Generator().manual_seed(0)
    near = 1 + 0.1 * torch.randn(5000, generator=generator)
    far = 4 + 0.5 * torch.randn(5000, generator=generator)
    distances, indices = torch.cat([near, far]), torch.arange(2).repeat_interleave(5000)
    calibration = calibrated(as_images(distances, 10), as_images(indices, 10), centers=2)
    scores = calibration(as_images(torch.tensor([1.2, 1.2, 5.0])), as_images(torch.tensor([0, 1, 1])))
    torch.testing.assert_close(scores, torch.tensor([[[2.0, -5.6, 2.0]]]), rtol=0.05, atol=0.05)


def test_a_center_of_few_patches_leans_on_all():
    generator = torch.Generator().manual_seed(0)
    distances = torch.cat([1 + torch.rand(1000, generator=generator), torch.tensor([50.0])])
    indices = torch.cat([torch.zeros(1000, dtype=torch.long), torch.ones(1, dtype=torch.long)])
    calibration = calibrated(as_images(distances, 7), as_images(indices, 7), centers=3)
    assert calibration.mean[0] == pytest.approx(1.5, abs=0.05)
    assert 1.5 < calibration.mean[1] < 10
    assert calibration.mean[2] == pytest.approx(distances.mean().item(), rel=1e-5)
    assert (calibration.deviation > 0).all()


def test_normal_images_score_alike_in_every_place():
    generator = torch.Generator().manual_seed(0)
    usual = torch.rand(6, 8, generator=generator)
    distances = 3 + usual + torch.rand(600, 6, 8, generator=generator)
    indices = torch.randint(4, distances.shape, generator=generator)
    calibration = calibrated(distances[:200], indices[:200], centers=4, grid=(6, 8))
    by_center, scores = (score(distances[200:], indices[200:]) for score in (calibration.at_centers, calibration))
    assert by_center.mean(dim=0).std() > 0.4
    assert scores.mean(dim=0).std() < 0.1
    torch.testing.assert_close(scores.std(dim=0), by_center.std(dim=0))  # nothing but the mean is taken off


def test_few_images_say_little_about_a_place():
    distances = torch.ones(40, 1, 2)
    distances[::2] = 3
    distances[..., 1] += 4
    indices = torch.zeros(distances.shape, dtype=torch.long)
    offsets = [calibrated(distances[:count], indices[:count], centers=1, grid=(1, 2)).offset[0, 1] for count in (4, 40)]
    assert 0 < offsets[0] < 0.5 * offsets[1]


@given(grid=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=st.integers(0, 99))
def test_images_of_another_size_take_the_offsets_resized(grid, seed):
    generator = torch.Generator().manual_seed(seed)
    calibration = calibrated(
        torch.rand(6, 3, 4, generator=generator), torch.zeros(6, 3, 4, dtype=torch.long), centers=1, grid=grid
    )
    assert calibration.offset.shape == grid
    distances, indices = torch.rand(2, 5, 7, generator=generator), torch.zeros(2, 5, 7, dtype=torch.long)
    taken_off = calibration.at_centers(distances, indices) - calibration(distances, indices)
    torch.testing.assert_close(taken_off[0], taken_off[1], rtol=1e-4, atol=1e-5)
    assert calibration.offset.min() - 1e-5 <= taken_off.min() <= taken_off.max() <= calibration.offset.max() + 1e-5


def test_the_patches_held_for_the_offsets_are_bounded(monkeypatch):
    monkeypatch.setattr(calibration_module, "_IMAGES_FOR_OFFSETS", 5)
    calibration = ScoreCalibration()
    calibration.reset(1)
    for _ in range(20):
        calibration.update(torch.rand(2, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long))
    assert sum(len(distances) for distances, _ in calibration._patches) == 6
    assert calibration._sums[0].sum() == 20 * 2 * 9
    calibration.restart()
    assert not calibration._patches


def test_processes_that_share_sums_agree_with_one_that_saw_all():
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(70, 2, 5, generator=generator)
    indices = torch.randint(5, distances.shape, generator=generator)
    whole = calibrated(distances, indices, centers=5, grid=(2, 5))
    barrier, given_in = threading.Barrier(2), [torch.empty(0)] * 2

    def share(process):
        def total(tensor):
            given_in[process] = tensor
            barrier.wait(timeout=30)
            summed = given_in[0] + given_in[1]
            barrier.wait(timeout=30)
            return summed

        own = slice(None, 30) if process == 0 else slice(30, None)
        return calibrated(distances[own], indices[own], centers=5, grid=(2, 5), total=total)

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(share, range(2)):
            for name, value in whole.state_dict().items():
                torch.testing.assert_close(found.state_dict()[name], value, msg=name)


def test_distances_count_as_they_are_before_any_normal_patch_was_seen():
    calibration = ScoreCalibration()
    calibration.reset(4)
    calibration.finish()
    distances = torch.tensor([[[2.0, 3.0]]])
    assert torch.equal(calibration(distances, torch.tensor([[[0, 3]]])), distances)


def test_constant_distances_give_finite_scores():
    calibration = calibrated(torch.full((5, 2, 3), 2.0), torch.zeros(5, 2, 3, dtype=torch.long), centers=2)
    assert calibration(torch.tensor([[[0.0, 2.0, 9.0]]]), torch.tensor([[[0, 1, 0]]])).isfinite().all()


def test_restored_with_its_state_and_copied_without_its_sums():
    calibration = calibrated(torch.rand(9, 2, 5), torch.randint(6, (9, 2, 5)), centers=6, grid=(2, 5))
    restored = ScoreCalibration()
    restored.load_state_dict(calibration.state_dict())
    assert torch.equal(restored.mean, calibration.mean)
    assert torch.equal(restored.offset, calibration.offset)
    for copied in (copy.deepcopy(calibration), pickle.loads(pickle.dumps(calibration))):
        assert torch.equal(copied.deviation, calibration.deviation)
        copied.update(torch.rand(1, 1, 3), torch.zeros(1, 1, 3, dtype=torch.long))
        assert copied._sums[0].sum() == 3
