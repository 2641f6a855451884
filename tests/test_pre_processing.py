import copy
import io
import pickle
from typing import Any

import pytest
import timm
import torch
from anomalib.data.transforms import ExportableCenterCrop, SquarePad
from anomalib.pre_processing import PreProcessor
from omegaconf import OmegaConf
from torch import nn
from torchvision.transforms import v2

from anomalib_cfa import Cfa
from anomalib_cfa.pre_processing import (
    configure_pre_processor,
    exportable_transform,
    find_random_part,
    make_exportable,
    visible_part,
    warn_of_late_resize,
)
from anomalib_cfa.resize import ExportableResize


class _OwnPreProcessor(PreProcessor):
    """A user's."""


class _OwnResize(v2.Resize):
    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return super().transform(inpt.flip(-1), params)


def _parts(transform: v2.Transform) -> list[str]:
    return [type(module).__name__ for module in transform.modules() if not isinstance(module, v2.Compose)]


def test_exportable_transform_is_a_copy_with_every_resize_replaced() -> None:
    transform = v2.Compose([v2.Compose([v2.Resize((8, 9)), v2.CenterCrop(8)]), v2.Resize(4, antialias=False)])
    exportable = exportable_transform(transform)
    assert [type(part) for part in transform.transforms] == [v2.Compose, v2.Resize]
    first, second = exportable.transforms[0].transforms[0], exportable.transforms[1]
    assert type(first) is type(second) is ExportableResize
    assert (first.size, first.antialias) == ([8, 9], True)
    assert (second.size, second.antialias) == ([4], False)
    assert isinstance(exportable.transforms[0].transforms[1], ExportableCenterCrop)


def test_exportable_transform_keeps_a_resize_of_its_own_kind() -> None:
    image = torch.rand(3, 10, 10)
    assert torch.equal(exportable_transform(_OwnResize(5))(image), _OwnResize(5)(image))


def test_exportable_transform_of_none() -> None:
    assert exportable_transform(None) is None


@pytest.mark.parametrize("kind", [PreProcessor, _OwnPreProcessor])
def test_what_is_exported_is_what_is_tested(kind: type[PreProcessor]) -> None:
    pre_processor = kind(v2.Compose([v2.Resize((64, 48)), v2.CenterCrop(40), v2.Normalize([0.5] * 3, [0.2] * 3)]))
    image = torch.rand(2, 3, 200, 130)
    assert not torch.allclose(pre_processor(image), pre_processor.transform(image), atol=1e-3)  # anomalib's own
    make_exportable(pre_processor)
    assert torch.equal(pre_processor(image), pre_processor.transform(image))


def test_what_is_exported_is_what_is_tested_after_a_checkpoint() -> None:
    saved = configure_pre_processor((64, 48), 40).checkpoint_config()
    pre_processor = configure_pre_processor()
    pre_processor.load_checkpoint_config(saved)
    make_exportable(pre_processor)
    image = torch.rand(2, 3, 200, 130)
    assert pre_processor(image).shape == (2, 3, 40, 40)
    assert torch.equal(pre_processor(image), pre_processor.transform(image))


def test_make_exportable_follows_a_changed_transform() -> None:
    pre_processor = configure_pre_processor()
    pre_processor.transform = None
    make_exportable(pre_processor)
    assert pre_processor.export_transform is None


def test_make_exportable_leaves_others_alone() -> None:
    make_exportable(None)
    module = nn.Identity()
    make_exportable(module)
    assert not hasattr(module, "export_transform")


def test_pre_processor_can_be_copied_and_pickled() -> None:
    pre_processor = configure_pre_processor((64, 48))
    image = torch.rand(1, 3, 100, 100)
    saved = io.BytesIO()
    torch.save(pre_processor, saved)
    saved.seek(0)
    for copied in (
        copy.deepcopy(pre_processor),
        pickle.loads(pickle.dumps(pre_processor)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(copied(image), pre_processor(image))


@pytest.mark.parametrize("size", [64, [64, 64], (64, 64), OmegaConf.create([64, 64])])
def test_configure_accepts_sizes_as_they_come(size: Any) -> None:
    for sizes in ({"image_size": size}, {"image_size": 80, "center_crop_size": size}):
        assert configure_pre_processor(**sizes).transform(torch.rand(3, 100, 90)).shape == (3, 64, 64)


def test_configured_pre_processor_can_be_saved_in_a_checkpoint() -> None:
    size = OmegaConf.create([64, 64])
    assert configure_pre_processor(size, size).checkpoint_config()["transform"] is not None


def test_configure_defaults_to_the_papers_size_with_imagenets_statistics() -> None:
    transformed = configure_pre_processor().transform(torch.zeros(3, 300, 200))
    assert transformed.shape == (3, 256, 256)
    torch.testing.assert_close(transformed[:, 0, 0], torch.tensor([-2.1179, -2.0357, -1.8044]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "64", (64,), (64, 64, 3), (64, 0), (64, 2.5)])
@pytest.mark.parametrize("name", ["image_size", "center_crop_size"])
def test_configure_names_a_wrong_size(name: str, size: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*, but is "):
        configure_pre_processor(**{name: size})


@pytest.mark.parametrize("crop", [65, (65, 1), (1, 49)])
def test_configure_refuses_a_crop_larger_than_the_image(crop: Any) -> None:
    with pytest.raises(ValueError, match=r"^center_crop_size must fit into image_size, but is "):
        configure_pre_processor((64, 48), crop)


@pytest.mark.parametrize(
    ("transform", "unknown"),
    [
        (None, None),
        (v2.Compose([SquarePad(), v2.Compose([v2.Resize(8), v2.CenterCrop(8)]), v2.Normalize([0.5], [0.5])]), None),
        (configure_pre_processor(center_crop_size=224).transform, None),
        (configure_pre_processor(center_crop_size=224).export_transform, None),
        (v2.RandomHorizontalFlip(), "RandomHorizontalFlip"),
        (v2.Compose([v2.Resize(8), v2.Compose([v2.GaussianNoise(), v2.JPEG(50)])]), "GaussianNoise"),
        (v2.RandomApply([v2.Resize(8)]), "RandomApply"),
        (v2.Lambda(lambda image: image), "Lambda"),
        (v2.Compose([_OwnResize(8)]), "_OwnResize"),
    ],
)
def test_first_transform_not_known_to_be_deterministic_is_named(transform: v2.Transform | None, unknown: str) -> None:
    assert find_random_part(transform) == unknown


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0.in1k", "test_resnet.r160_in1k"])
def test_images_are_normalized_as_the_backbones_weights_were_trained(name: str) -> None:
    config = timm.get_pretrained_cfg("resnet18.tv_in1k" if name == "resnet18" else name)
    images = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    model = Cfa(name, pre_trained=False, image_size=64)
    for transform in (model.pre_processor.transform, model.pre_processor):
        torch.testing.assert_close(transform(images), (images - mean) / std)


def test_a_users_own_normalization_is_left_alone_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    own = PreProcessor(v2.Compose([v2.Resize((64, 64)), v2.Normalize([0.3] * 3, [0.2] * 3)]))
    model = Cfa("test_resnet.r160_in1k", pre_trained=False, pre_processor=own)
    assert model.pre_processor is own
    assert "mean [0.3, 0.3, 0.3] and std [0.2, 0.2, 0.2]" in caplog.text
    assert "were trained with [0.5, 0.5, 0.5]" in caplog.text
    caplog.clear()
    Cfa(
        "test_resnet.r160_in1k",
        pre_trained=False,
        pre_processor=configure_pre_processor(64, None, "test_resnet.r160_in1k"),
    )
    assert "were trained with" not in caplog.text


def test_a_backbone_of_one_size_takes_a_pre_processor_that_does_not_tell_its_size():
    model = Cfa("test_vit.r160_in1k", pre_trained=False, visualizer=False, pre_processor=nn.Identity())
    assert len(model.model.pyramid(torch.rand(1, 3, 160, 160))) > 0


def test_a_size_of_ones_own_is_checked_when_images_come():
    # Anomalib's tiled ensemble builds throw-away models whose pre-processor has 10 x 10 pixels.
    model = Cfa("resnet18", pre_trained=False, visualizer=False, pre_processor=Cfa.configure_pre_processor(10))
    with pytest.raises(ValueError, match="images must be at least 16 pixels a side"):
        model.model.pyramid(torch.rand(1, 3, 10, 10))
    with pytest.raises(ValueError, match="images must be at least 16 pixels a side"):
        Cfa("resnet18", pre_trained=False, visualizer=False, image_size=10)


@pytest.mark.parametrize(
    ("before", "named"),
    [
        ([v2.CenterCrop(80)], "CenterCrop"),
        ([SquarePad()], "SquarePad"),
        ([], None),
        ([v2.ToDtype(torch.float32)], None),
    ],
)
def test_a_resize_behind_what_changes_the_shape_is_warned_of(before: list[Any], named: str, caplog: Any) -> None:
    warn_of_late_resize(PreProcessor(v2.Compose([v2.Compose([*before, v2.Resize((64, 64))]), v2.CenterCrop(32)])))
    assert (f"has {named} before it" in caplog.text) if named else not caplog.text


def test_what_is_visible_is_known_only_where_it_is_the_same_of_all_images():
    resize, crop, rgb = v2.Resize((64, 128)), v2.CenterCrop((32, 64)), v2.RGB()
    seen = {
        (rgb, resize): (0, 0, 1, 1),
        (resize, rgb, crop): (0.25, 0.25, 0.75, 0.75),
        (rgb,): (0, 0, 1, 1),
        (v2.Resize(64), crop): None,
        (resize, v2.Pad(3)): None,
        (crop, resize): None,
    }
    for parts, expected in seen.items():
        assert visible_part(PreProcessor(v2.Compose(list(parts)))) == expected
    assert visible_part(None) == (0, 0, 1, 1)
