import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalib_cfa.torch_model import CfaModel
from anomalib_cfa.views import average_views, central_view


def fitted(**arguments) -> CfaModel:
    model = CfaModel("test_resnet.r160_in1k", pre_trained=False, **arguments).eval()
    builder = model.bank_builder()
    images = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    builder.update(model.describe(model.pyramid(images)).flatten(1, 2))
    model.assign_bank(builder.centers())
    return model


def test_the_central_view_of_256_pixels_is_the_papers_224():
    image = torch.arange(256 * 256).reshape(256, 256)
    assert torch.equal(central_view(image), image[16:240, 16:240])


@given(height=st.integers(8, 70), width=st.integers(8, 70))
def test_the_views_are_averaged_where_both_see_the_image(height, width):
    whole = torch.zeros(1, height, width)
    central = 2 * torch.ones_like(central_view(whole))
    averaged = average_views(whole, central)
    assert averaged.shape == whole.shape
    assert (central_view(averaged) == 1).all()
    assert averaged.sum() == central.numel()


def test_a_prediction_is_that_of_both_views():
    both, single = fitted(center_view=True), fitted()
    images = torch.rand(2, 3, 128, 128)
    with torch.inference_mode():
        prediction, whole, central = both(images), single(images), single(central_view(images))
    expected = average_views(whole.anomaly_map, central.anomaly_map)
    torch.testing.assert_close(prediction.anomaly_map, expected)
    torch.testing.assert_close(prediction.pred_score, expected.amax(dim=(1, 2)))


def test_training_sees_the_whole_image():
    both, single = fitted(center_view=True).train(), fitted().train()
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(both(images), single(images))


def test_images_whose_centre_is_too_small_are_refused():
    with pytest.raises(ValueError, match="images must be at least"):
        fitted(center_view=True)(torch.rand(1, 3, 18, 18))
