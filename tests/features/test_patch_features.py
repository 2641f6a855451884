import copy
import os
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F  # noqa: N812

from anomalib_cfa.features import weights as backbone_weights
from anomalib_cfa.features.backbones import find_backbone
from anomalib_cfa.features.folding import fold_batch_norms
from anomalib_cfa.features.network import StepwiseFeatures, build_network, default_layers, map_shapes
from anomalib_cfa.features.patch_features import PatchFeatures
from anomalib_cfa.features.same_padding import ExportableConv2dSame, replace_same_padding

TINY = "test_resnet.r160_in1k"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with random weights and batch statistics, so that no two of its layers do the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                fan_in = max(1, value[0].numel() if value.ndim > 1 else 1)
                noise = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5
                value.copy_(noise.abs() + 0.5 if "running_var" in name else noise)
    return module.eval()


def pool(features: Tensor) -> Tensor:
    return F.avg_pool2d(features, 3, stride=1, padding=1)


def tapped(model: nn.Module, layers: list[str], images: Tensor) -> dict[str, Tensor]:
    """The outputs of a whole model's layers, by forward hooks."""
    outputs: dict[str, Tensor] = {}

    def keep(layer: str) -> object:
        return lambda _module, _inputs, output: outputs.update({layer: output.clone()})

    handles = [model.get_submodule(layer).register_forward_hook(keep(layer)) for layer in layers]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return outputs


# --- The paper's backbones


@pytest.mark.parametrize(
    ("backbone", "weights", "layers", "channels", "strides", "width_multiplier"),
    [
        ("resnet18", "resnet18.tv_in1k", "layer2 layer3", (128, 256), (8, 16), 1),
        ("wide_resnet50_2", "wide_resnet50_2.tv_in1k", "layer2 layer3", (512, 1024), (8, 16), 1),
        ("vgg19_bn", "vgg19_bn.tv_in1k", "features.25 features.38 features.52", (256, 512, 512), (4, 8, 32), 1),
        (
            "efficientnet_b5",
            "tf_efficientnet_b5.aa_in1k",
            "blocks.1.0 blocks.1.1 blocks.1.2 blocks.1.3 blocks.1.4 blocks.2.2 blocks.2.3 blocks.2.4 blocks.4.6",
            (200, 192, 176),
            (4, 8, 16),
            2,
        ),
    ],
)
def test_the_papers_backbones_have_the_authors_weights(backbone, weights, layers, channels, strides, width_multiplier):
    patch_features = PatchFeatures(backbone)
    assert patch_features.weights_tag == weights
    assert patch_features.layers == tuple(layers.split())
    assert patch_features.channels == channels
    assert patch_features.strides == strides
    assert patch_features.width_multiplier == width_multiplier


def test_an_explicit_tag_keeps_the_layers_of_the_family():
    assert find_backbone("resnet18.a1_in1k").name == "resnet18.a1_in1k"
    assert find_backbone("vgg19_bn.tv_in1k") == find_backbone("vgg19_bn")
    plain, tagged = find_backbone("efficientnet_b5"), find_backbone("efficientnet_b5.sw_in12k")
    assert tagged.name == "efficientnet_b5.sw_in12k"
    assert (tagged.layers, tagged.width_multiplier) == (plain.layers, 2)


def test_another_model_takes_timms_default_tag():
    assert find_backbone("test_resnet").name == TINY


def _torchvision_vgg19_features() -> nn.Module:
    with torch.device("meta"):  # for the sake of the classifier, which is large
        return torchvision.models.vgg19_bn().features.to_empty(device="cpu")


@pytest.mark.parametrize(
    ("backbone", "build", "layers"),
    [
        ("resnet18", torchvision.models.resnet18, ["layer1", "layer2", "layer3"]),
        ("wide_resnet50_2", torchvision.models.wide_resnet50_2, ["layer1", "layer2", "layer3"]),
        ("vgg19_bn", _torchvision_vgg19_features, ["25", "38", "52"]),
    ],
)
def test_features_are_those_of_torchvisions_model_with_the_same_weights(backbone, build, layers, tmp_path):
    reference = randomized(build())
    prefix = "features." if backbone == "vgg19_bn" else ""
    path = tmp_path / "weights.pth"
    features = {prefix + k: v for k, v in reference.state_dict().items() if not k.startswith(("layer4", "fc"))}
    torch.save(features, path)
    patch_features = PatchFeatures(backbone, [prefix + layer for layer in layers], weights_path=path)
    patch_features.load_weights()

    images = torch.randn(1, 3, 64, 96)
    expected = tapped(reference, layers, images)
    for level, layer in zip(patch_features(images), layers, strict=True):
        torch.testing.assert_close(level, pool(expected[layer]), rtol=1e-4, atol=1e-4 * float(level.abs().max()))


def test_efficientnet_levels_are_concatenated_and_divided_by_their_channels():
    patch_features = PatchFeatures("efficientnet_b5", pre_trained=False)
    randomized(patch_features.network)
    reference = timm.create_model("tf_efficientnet_b5", num_classes=0).eval()
    state = {key.removeprefix("model."): value for key, value in patch_features.network.state_dict().items()}
    assert not reference.load_state_dict(state, strict=False).unexpected_keys

    images = torch.randn(1, 3, 65, 98)
    outputs = tapped(reference, list(patch_features.layers), images)
    by_level = ([f"blocks.1.{i}" for i in range(5)], [f"blocks.2.{i}" for i in (2, 3, 4)], ["blocks.4.6"])
    for level, layers in zip(patch_features(images), by_level, strict=True):
        expected = pool(torch.cat([outputs[layer] for layer in layers], dim=1))
        torch.testing.assert_close(level, expected / expected.shape[1], rtol=1e-4, atol=1e-4 * float(level.abs().max()))


# --- Any timm model


@pytest.mark.parametrize(
    "backbone",
    [
        TINY,
        "test_convnext.r160_in1k",
        "test_efficientnet.r160_in1k",
        "hardcorenas_a.miil_green_in1k",  # not taken by timm's getter
        "test_vit.r160_in1k",
        "swin_tiny_patch4_window7_224.ms_in1k",  # channels last
    ],
)
def test_channels_and_strides_are_those_of_the_maps_for_images_of_any_size(backbone):
    patch_features = PatchFeatures(backbone, pre_trained=False)
    assert patch_features.strides == tuple(sorted(set(patch_features.strides)))
    for height, width in ((64, 96), (96, 32)):
        patch_features.check_image_size(height, width)
        for level, channels, stride in zip(
            patch_features(torch.randn(2, 3, height, width)),
            patch_features.channels,
            patch_features.strides,
            strict=True,
        ):
            assert level.shape == (2, channels, height // stride, width // stride)
            assert level.isfinite().all()


def test_layers_that_share_a_name_are_told_apart_by_default():
    patch_features = PatchFeatures("coat_tiny", pre_trained=False, image_size=(64, 96))
    assert patch_features.layers == ("parallel_blocks", "parallel_blocks")
    assert patch_features.strides == (8, 16)
    sizes = [tuple(level.shape[-2:]) for level in patch_features(torch.randn(1, 3, 64, 96))]
    assert sizes == [(8, 12), (4, 6)]


def test_features_are_timms_pooled():
    patch_features = PatchFeatures(TINY, pre_trained=False)
    reference = timm.create_model(TINY, features_only=True, out_indices=(2, 3)).eval()
    reference.load_state_dict({k.removeprefix("model."): v for k, v in patch_features.network.state_dict().items()})
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        for level, features in zip(patch_features(images), reference(images), strict=True):
            torch.testing.assert_close(level, pool(features))


def test_layers_of_one_stride_make_up_one_level():
    patch_features = PatchFeatures("test_vit", layers=["blocks.4", "blocks.0"], pre_trained=False)
    assert patch_features.layers == ("blocks.0", "blocks.4")
    assert patch_features.channels == (128,)
    assert [tuple(level.shape) for level in patch_features(torch.randn(1, 3, 160, 160))] == [(1, 128, 10, 10)]


def test_single_blocks_can_be_chosen_and_nothing_overwrites_them():
    patch_features = PatchFeatures("resnet18", layers=["layer2.0", "bn1", "layer1"], pre_trained=False)
    assert patch_features.layers == ("bn1", "layer1.1", "layer2.0")
    assert patch_features.strides == (2, 4, 8)
    reference = timm.create_model("resnet18", num_classes=0).eval()
    state = {key.removeprefix("model."): value for key, value in patch_features.network.state_dict().items()}
    reference.load_state_dict(state, strict=False)
    images = torch.randn(1, 3, 64, 64)
    expected = tapped(reference, ["bn1", "layer1", "layer2.0"], images)
    for level, features in zip(patch_features(images), expected.values(), strict=True):
        torch.testing.assert_close(level, pool(features))


@pytest.mark.parametrize("backbone", [TINY, "test_efficientnet.r160_in1k"])
def test_a_chain_of_steps_gives_the_features_that_timm_gives(backbone):
    whole = timm.create_model(backbone, num_classes=0).eval()
    layers = [whole.feature_info[index]["module"] for index in (1, 3, 4)]
    reference = build_network(backbone, layers).eval()
    reference.load_state_dict({f"model.{k}": v for k, v in whole.state_dict().items()}, strict=False)
    stepwise = StepwiseFeatures(whole, layers)
    assert stepwise.feature_info.channels() == reference.feature_info.channels()
    assert stepwise.feature_info.reduction() == reference.feature_info.reduction()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for features, expected in zip(stepwise(images), reference(images), strict=True):
            torch.testing.assert_close(features, expected)


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ([2, 4, 8, 16, 32], [2, 3]),
        ([4, 8, 16, 32], [1, 2]),
        ([2, 4, 8, 8, 16, 16, 32], [3, 5]),
        ([16] * 12, [2, 5, 8]),
        ([14] * 2, [0, 1]),
        ([16], [0]),
        ([7, 14, 14, 14], [3]),
        ([32, 64], [0]),
    ],
)
def test_default_layers(strides, expected):
    assert default_layers(strides) == expected


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [("resnet18", None), ("resnet18", ["layer2.0"]), ("test_efficientnet", None), ("test_vit", None)],
)
def test_nothing_deeper_than_the_deepest_layer_is_kept(backbone, layers):
    patch_features = PatchFeatures(backbone, layers, pre_trained=False)
    whole = timm.create_model(patch_features.weights_tag)
    reference = sum(parameter.numel() for parameter in whole.parameters())
    assert sum(parameter.numel() for parameter in patch_features.parameters()) < 0.9 * reference
    deeper = ("layer4", "fc", "blocks.5", "blocks.6", "conv_head", "classifier", "head")
    assert not [key for key in patch_features.state_dict() if key.removeprefix("network.model.").startswith(deeper)]


# --- Frozen


def test_the_backbone_stays_frozen_and_in_evaluation_mode():
    patch_features = PatchFeatures(TINY, pre_trained=False)
    before = copy.deepcopy(patch_features.state_dict())
    nn.Sequential(patch_features).train()
    assert not any(module.training for module in patch_features.modules())
    assert not any(parameter.requires_grad for parameter in patch_features.parameters())
    pyramid = patch_features(torch.randn(2, 3, 64, 64, requires_grad=True))
    assert not any(level.requires_grad for level in pyramid)
    assert all(torch.equal(value, before[key]) for key, value in patch_features.state_dict().items())


def test_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    expected_next = torch.rand(1)
    torch.manual_seed(1)
    first = PatchFeatures(TINY, pre_trained=False)
    assert torch.equal(torch.rand(1), expected_next), "the global generator was touched"
    second = PatchFeatures(TINY, pre_trained=False)
    other = PatchFeatures(TINY, pre_trained=False, seed=1)
    images = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(first(images), second(images), strict=True))
    assert not torch.equal(first(images)[0], other(images)[0])
    first.load_weights()
    assert all(torch.equal(a, b) for a, b in zip(first(images), second(images), strict=True))


@pytest.mark.parametrize(
    ("backbone", "layers"), [(TINY, None), (TINY, ["layer2.0"]), ("tf_efficientnet_b0", None), ("test_vit", None)]
)
def test_copies_give_the_same_features(backbone, layers):
    patch_features = PatchFeatures(backbone, layers, pre_trained=False)
    images = torch.randn(1, 3, 64, 64)
    expected = patch_features(images)
    for twin in (copy.deepcopy(patch_features), pickle.loads(pickle.dumps(patch_features))):
        assert all(torch.equal(a, b) for a, b in zip(twin(images), expected, strict=True))


# --- Weights


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """A state dict of the whole tiny model, as timm's hub has it."""
    return randomized(timm.create_model(TINY), seed=3).state_dict()


def save(weights: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


def assert_holds(patch_features: PatchFeatures, weights: dict[str, Tensor]) -> None:
    for key, value in patch_features.network.state_dict().items():
        assert torch.equal(value, weights[key.removeprefix("model.")]), key


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_weights_come_from_a_local_file_once(weights, suffix, tmp_path):
    path = save(weights, tmp_path / f"weights{suffix}")
    patch_features = PatchFeatures(TINY, weights_path=path)
    patch_features.load_weights()
    assert_holds(patch_features, weights)
    path.unlink()
    patch_features.load_weights()


def test_a_file_of_features_only_is_enough(weights, tmp_path):
    features = {k: v for k, v in weights.items() if not k.startswith(("layer4", "fc")) and "num_batches" not in k}
    patch_features = PatchFeatures(TINY, weights_path=save(features, tmp_path / "weights.safetensors"))
    patch_features.load_weights()
    assert_holds(patch_features, weights)


def test_a_wrapped_state_dict_is_unwrapped(weights, tmp_path):
    wrapped = {"state_dict": {f"module.{key}": value for key, value in weights.items()}, "epoch": 3}
    patch_features = PatchFeatures(TINY, weights_path=save(wrapped, tmp_path / "weights.pth"))
    patch_features.load_weights()
    assert_holds(patch_features, weights)


def test_a_restored_module_needs_neither_file_nor_hub(weights, tmp_path):
    path = save(weights, tmp_path / "weights.pth")
    saved = PatchFeatures(TINY, weights_path=path)
    saved.load_weights()
    path.unlink()
    for weights_path in (path, None):
        restored = PatchFeatures(TINY, weights_path=weights_path)
        restored.load_state_dict(saved.state_dict())
        restored.load_weights()
        assert_holds(restored, weights)


def test_missing_and_misshaped_weights_are_listed_and_change_nothing(weights, tmp_path):
    del weights["layer2.0.conv1.weight"]
    weights["layer1.0.conv1.weight"] = weights["layer1.0.conv1.weight"][:3]
    weights["bn1.running_var"][0] = float("nan")
    patch_features = PatchFeatures(TINY, weights_path=save(weights, tmp_path / "weights.pth"))
    before = copy.deepcopy(patch_features.state_dict())
    with pytest.raises(ValueError, match="do not fit") as error:
        patch_features.load_weights()
    for part in (
        "layer2.0.conv1.weight is missing",
        "layer1.0.conv1.weight has shape (3,",
        "bn1.running_var holds nan",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in patch_features.state_dict().items())


def test_another_models_weights_are_refused_with_the_first_keys(tmp_path):
    path = save({"encoder.weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"conv1\.0\.weight is missing.*and \d+ more.*encoder\.weight"):
        PatchFeatures(TINY, weights_path=path).load_weights()


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"weights_path .*nowhere\.pth"):
        PatchFeatures(TINY, weights_path="nowhere.pth").load_weights()


class _Evil:
    def __reduce__(self):
        return os.getcwd, ()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", ["truncated", "foreign", "empty", "code", "not a state dict"])
def test_a_file_of_something_else_is_refused(weights, suffix, kind, tmp_path):
    path = save(weights, tmp_path / f"weights{suffix}")
    match kind:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
        case "foreign":
            path.write_bytes(b"GIF89a" + bytes(range(256)) * 8)
        case "empty":
            path.write_bytes(b"")
        case "code":
            torch.save({"conv1.weight": _Evil()}, path)
        case _:
            torch.save({"conv1.weight": 3}, path)
    with pytest.raises(ValueError, match="weights_path must"):
        PatchFeatures(TINY, weights_path=path).load_weights()


def test_another_suffix_is_refused(weights, tmp_path):
    path = save(weights, tmp_path / "weights.npz")
    with pytest.raises(ValueError, match=r"\.safetensors, \.pth, \.pt"):
        PatchFeatures(TINY, weights_path=path).load_weights()


@pytest.mark.parametrize("layers", [None, ["layer2.0", "layer3"]])
def test_weights_in_the_hubs_cache_are_used_without_the_hub(weights, layers, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--timm--test_resnet.r160_in1k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    save(weights, snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_session", pytest.fail)
    patch_features = PatchFeatures(TINY, layers=layers)
    patch_features.load_weights()
    assert_holds(patch_features, weights)


def test_a_hub_out_of_reach_is_told_at_once_with_the_way_out(tmp_path, monkeypatch):
    class CutOff:
        def head(self, _url: str, timeout: float) -> None:
            assert timeout <= 10
            msg = "no route"
            raise OSError(msg)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_session", CutOff)
    with pytest.raises(ConnectionError, match=r"test_resnet\.r160_in1k.*no route.*weights_path"):
        PatchFeatures(TINY).load_weights()


def test_a_download_that_breaks_off_is_told(monkeypatch):
    def breaks_off(*_args: object, **_options: object) -> None:
        msg = "connection reset"
        raise OSError(msg)

    patch_features = PatchFeatures(TINY)
    monkeypatch.setattr("anomalib_cfa.features.patch_features.hub_options", lambda _name: {"pretrained": True})
    monkeypatch.setattr("anomalib_cfa.features.patch_features.build_network", breaks_off)
    with pytest.raises(ConnectionError, match="connection reset"):
        patch_features.load_weights()
    assert not patch_features.weights_loaded


def test_models_that_the_hub_does_not_hold_are_left_to_timm(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_session", pytest.fail)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _name: timm.models.PretrainedCfg(url="https://host/file"))
    assert backbone_weights.hub_options("any") == {"pretrained": True}


# --- Bad input


@pytest.mark.parametrize(
    ("backbone", "close"), [("resnet81", "resnet18"), ("resnet18.tv", "resnet18.tv_in1k"), ("?", "vgg19_bn")]
)
def test_an_unknown_backbone_is_answered_with_close_names(backbone, close):
    with pytest.raises(ValueError, match="backbone must be") as error:
        PatchFeatures(backbone)
    assert backbone in str(error.value)
    assert close in str(error.value)


@pytest.mark.parametrize(
    ("backbone", "layers", "message"),
    [
        (TINY, ["layer1", "layer9"], r"\['layer9'\] are not; available: .*layer3.*layer4\.0"),
        (TINY, ["layer1", "fc"], r"\['fc'\] are not"),
        ("test_vit", ["norm"], r"\['norm'\] are not; available: blocks\.0, "),
        (TINY, "layer1", "list of different names"),
        (TINY, [], "list of different names"),
        (TINY, ["layer1", "layer1"], "list of different names"),
    ],
)
def test_unknown_layers_are_answered_with_those_there_are(backbone, layers, message):
    with pytest.raises(ValueError, match=f"layers must be.*{message}"):
        PatchFeatures(backbone, layers=layers, pre_trained=False)


def test_weights_that_contradict_the_other_arguments_are_refused():
    with pytest.raises(ValueError, match="weights_path must be None if pre_trained is False"):
        PatchFeatures(TINY, pre_trained=False, weights_path="weights.pth")
    with pytest.raises(ValueError, match="'botnet50ts_256' has no pre-trained weights"):
        PatchFeatures("botnet50ts_256")


@given(height=st.integers(1, 50), width=st.integers(1, 50))
@settings(max_examples=20)
def test_images_must_reach_the_deepest_stride(height, width):
    patch_features = _TINY_FEATURES
    if min(height, width) < 16:
        with pytest.raises(ValueError, match=rf"at least 16 pixels.*'layer3', but are {height} x {width}"):
            patch_features.check_image_size(height, width)
    else:
        patch_features.check_image_size(height, width)
        sizes = [level.shape[-2:] for level in patch_features(torch.zeros(1, 3, height, width))]
        assert sizes == [(-(-height // s), -(-width // s)) for s in patch_features.strides]


_TINY_FEATURES = PatchFeatures(TINY, pre_trained=False)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused_by_name():
    patch_features = PatchFeatures("test_vit", pre_trained=False)
    with pytest.raises(ValueError, match=r"'test_vit\.r160_in1k'.*100 x 160 pixels: Input height"):
        patch_features.check_image_size(100, 160)
    with pytest.raises(ValueError, match="100 x 160"):
        PatchFeatures("test_vit", pre_trained=False, image_size=(100, 160))


def test_a_model_for_one_size_is_built_for_image_size_and_refuses_others():
    patch_features = PatchFeatures("test_vit_relpos", pre_trained=False, image_size=(96, 128))
    assert [tuple(level.shape[-2:]) for level in patch_features(torch.randn(1, 3, 96, 128))] == [(6, 8)]
    with pytest.raises(ValueError, match=r"test_vit_relpos.*image_size = \(96, 128\).*160 x 160"):
        patch_features.check_image_size(160, 160)


def test_a_model_that_cannot_be_built_for_image_size_is_refused_by_name():
    with pytest.raises(ValueError, match=r"xcit_nano_12_p8_224.*image_size = \(100, 100\): `patch_size` should divide"):
        PatchFeatures("xcit_nano_12_p8_224", pre_trained=False, image_size=(100, 100))


def test_a_checked_size_is_not_checked_again(monkeypatch):
    patch_features = PatchFeatures(TINY, pre_trained=False)
    patch_features.check_image_size(64, 96)
    monkeypatch.setattr("anomalib_cfa.features.patch_features.map_shapes", pytest.fail)
    patch_features.check_image_size(64, 96)


def test_shapes_of_a_model_that_reads_values_as_it_runs():
    class ReadsValues(nn.Conv2d):
        def forward(self, images: Tensor) -> list[Tensor]:
            return [self._conv_forward(images, self.weight, self.bias)[..., int(images.sum()) :]]

    assert map_shapes(ReadsValues(3, 5, 3), 8, 9) == [torch.Size((1, 5, 6, 7))]


# --- Export


@pytest.mark.parametrize("backbone", [TINY, "test_vit.r160_in1k"])
def test_export_with_dynamic_batch_and_size(backbone):
    patch_features = PatchFeatures(backbone, pre_trained=False)
    dynamic = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    exported = torch.export.export(patch_features, (torch.randn(2, 3, 64, 96),), dynamic_shapes=dynamic).module()
    images = torch.randn(1, 3, 112, 80)
    for level, expected in zip(exported(images), patch_features(images), strict=True):
        torch.testing.assert_close(level, expected)


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    kernel=st.tuples(st.sampled_from([3, 5, 7]), st.sampled_from([3, 5, 7])),
)
@settings(max_examples=50)
def test_the_exportable_same_padding_computes_the_same(height, width, kernel):
    convolution = Conv2dSame(2, 3, kernel, stride=2)
    images = torch.randn(1, 2, height, width)
    expected = convolution(images)
    replace_same_padding(convolution)
    assert type(convolution) is ExportableConv2dSame
    assert torch.equal(convolution(images), expected)


def test_other_convolutions_keep_their_form():
    forms = ((2, 2, 1), (1, 2, 1), (3, 3, 1), (3, 2, 2), (3, 1, 1))
    others = [Conv2dSame(1, 1, kernel, stride, dilation=dilation) for kernel, stride, dilation in forms]
    others.append(nn.Conv2d(1, 1, 3, stride=2))
    types = [type(module) for module in others]
    assert [type(module) for module in replace_same_padding(nn.Sequential(*others)).children()] == types


def test_symbolic_sizes_do_not_grow_with_depth():
    network = replace_same_padding(nn.Sequential(*(Conv2dSame(1, 1, 3, stride=2) for _ in range(5))))
    dynamic = ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    exported = torch.export.export(network, (torch.randn(1, 1, 96, 64),), dynamic_shapes=dynamic)
    (output,) = exported.graph.output_node().args[0]
    assert str(output.meta["val"].shape[2]).count("s") == 1


# --- Real weights


def test_real_weights_load_from_a_features_only_file():
    path = os.environ.get("ANOMALIB_CFA_TEST_WEIGHTS")
    if not path:
        pytest.skip("ANOMALIB_CFA_TEST_WEIGHTS names no file of ResNet-18's weights")
    patch_features = PatchFeatures("resnet18", ["layer1", "layer2", "layer3"], weights_path=path)
    patch_features.load_weights()
    reference = timm.create_model("resnet18.tv_in1k", features_only=True, out_indices=(1, 2, 3)).eval()
    assert not reference.load_state_dict(safetensors.torch.load_file(path), strict=False).missing_keys
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for level, expected in zip(patch_features(images), reference(images), strict=True):
            torch.testing.assert_close(level, pool(expected))


class TestFolding:
    @pytest.mark.parametrize(
        "backbone",
        ["resnet18", "tf_efficientnet_lite0.in1k", "densenet121", "resnetv2_50", "vgg19_bn", "vit_tiny_patch16_224"],
    )
    def test_what_runs_computes_what_the_network_does(self, backbone: str) -> None:
        features = PatchFeatures(backbone, pre_trained=False, image_size=(64, 64))
        randomized(features.network)
        images = torch.rand(2, 3, 64, 64)
        folded = fold_batch_norms(features.network)
        with torch.no_grad():
            for found, expected in zip(folded(images), features.network(images), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        norms = [module for module in features.network.modules() if isinstance(module, nn.BatchNorm2d)]
        left = [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(left) < len(norms) or not norms

    def test_a_map_between_convolution_and_norm_is_not_scaled(self) -> None:
        network = build_network("vgg11_bn", ["features.4", "features.7"])  # a convolution, and one further on
        randomized(network)
        images = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            for found, expected in zip(fold_batch_norms(network)(images), network(images), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))

    def test_what_is_used_twice_is_not_changed(self) -> None:
        class Sharing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.once, self.twice, self.added, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
                self.norm, self.shared, self.other, self.of_last = (nn.BatchNorm2d(3) for _ in range(4))
                self.alias = self.of_last

            def forward(self, images: Tensor) -> list[Tensor]:
                first = self.shared(self.twice(self.shared(self.once(images))))
                second = self.norm(self.twice(images))
                added = self.added(first + second)
                return [self.other(added) + added, self.alias(self.last(first))]

        network = randomized(Sharing())
        images = torch.rand(1, 3, 32, 32)
        folded = fold_batch_norms(network)
        with torch.no_grad():
            for found, expected in zip(folded(images), network(images), strict=True):
                torch.testing.assert_close(found, expected)

    def test_new_weights_count_at_once(self) -> None:
        features, other = (PatchFeatures(TINY, pre_trained=False) for _ in range(2))
        randomized(other.network, seed=1)
        images = torch.rand(1, 3, 64, 64)
        before = features(images)
        features.load_state_dict(other.state_dict())
        for found, expected, old in zip(features(images), other(images), before, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            assert not torch.allclose(found, old)
        assert features.to(torch.bfloat16)(images.bfloat16())[0].dtype == torch.bfloat16
        assert copy.deepcopy(features)(images.bfloat16())[0].dtype == torch.bfloat16

    def test_the_state_is_that_of_the_network(self) -> None:
        features = PatchFeatures(TINY, pre_trained=False)
        names = list(features.state_dict())
        features(torch.rand(1, 3, 64, 64))
        assert list(features.state_dict()) == names
        assert any("running_mean" in name for name in names)
