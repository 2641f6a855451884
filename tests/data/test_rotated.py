"""RD-MVTec AD: image and mask move together, and the test split's draws are the seed's."""

import pytest
import torch
from torchvision.tv_tensors import Mask

from anomalib_cfa.data import RandomPose, RotatedMVTecAD

SIZES = {"image_size": 72, "crop_size": 64}


def rotated(root, **arguments):
    datamodule = RotatedMVTecAD(root, **({"category": "tile", "num_workers": 0} | SIZES | arguments))
    datamodule.setup()
    return datamodule


def test_image_and_mask_are_turned_and_cropped_together():
    blob = torch.zeros(96, 96)
    blob[20:50, 40:80] = 1
    for seed in range(20):
        torch.manual_seed(seed)
        image, mask = RandomPose(**SIZES)(blob.expand(3, -1, -1), Mask(blob.to(torch.uint8)))
        assert image.shape == (3, 64, 64)
        assert mask.shape == (64, 64)
        assert set(mask.unique().tolist()) <= {0, 1}
        # They may differ where the image's edges are blended, and nowhere else.
        assert ((image[0] > 0.5) != mask.bool()).float().mean() < 0.01


def test_turns_and_crops_vary_within_their_ranges():
    corner = torch.zeros(3, 72, 72)
    corner[:, :8, :8] = 1
    crops_only = RandomPose(degrees=0, **SIZES)
    seen = {int(crops_only(corner)[0].sum()) for _ in range(50)}
    assert min(seen) >= 0
    assert max(seen) <= 64
    assert len(seen) > 10
    whole = RandomPose(degrees=10, image_size=72, crop_size=72)(torch.ones(3, 72, 72))
    assert 0.8 < whole.mean() <= 1  # 10 degrees uncover 8 % of a square


def test_a_test_image_is_drawn_alike_whatever_came_before(rendered_mvtec):
    first, second = rotated(rendered_mvtec), rotated(rendered_mvtec)
    there = [first.test_data[index] for index in range(len(first.test_data))]
    torch.manual_seed(123)
    back = [second.test_data[index] for index in reversed(range(len(second.test_data)))][::-1]
    for one, other in zip(there, back, strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.gt_mask, other.gt_mask)
    for one, other in zip(there, (first.val_data[index] for index in range(len(there))), strict=True):
        assert torch.equal(one.image, other.image)


def test_reading_test_images_leaves_the_random_state_alone(rendered_mvtec):
    data = rotated(rendered_mvtec).test_data
    before = torch.random.get_rng_state()
    data[0]
    assert torch.equal(before, torch.random.get_rng_state())


def test_another_seed_draws_the_test_side_otherwise(rendered_mvtec):
    first, other = rotated(rendered_mvtec, seed=0), rotated(rendered_mvtec, seed=1)
    assert not torch.equal(first.test_data[0].image, other.test_data[0].image)


def test_the_draws_do_not_depend_on_where_the_data_set_lies(rendered_mvtec, tmp_path):
    (tmp_path / "elsewhere").symlink_to(rendered_mvtec)
    here, there = rotated(rendered_mvtec), rotated(tmp_path / "elsewhere")
    assert torch.equal(here.test_data[0].image, there.test_data[0].image)


def test_a_training_image_is_drawn_anew_each_time(rendered_mvtec):
    data = rotated(rendered_mvtec).train_data
    assert not torch.equal(data[0].image, data[0].image)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"degrees": -1}, "degrees"), ({"degrees": float("nan")}, "degrees"), ({"crop_size": 80}, "crop_size")],
)
def test_an_argument_out_of_its_range_is_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        RotatedMVTecAD(**(SIZES | arguments))
