import inspect
import io
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalib_cfa import Cfa
from anomalib_cfa.hyperparameters import RULES, check_hyperparameters, check_neighbors

RIGHT = {
    "backbone": ["resnet18", "resnet18.tv_in1k"],
    "layers": [None, ["layer2"], ("layer1", "layer2")],
    "weights_path": [None, "weights.pth", Path("weights.pth")],
    "pre_processor": [True, False, torch.nn.Identity()],
    "post_processor": [True, False, torch.nn.Identity()],
    "evaluator": [True, False, Cfa.configure_evaluator()],
    "visualizer": [True, False],
    "image_size": [None, 64, [64, 96], (1, 1)],
    "center_crop_size": [None, 1, [64, 96]],
    "gamma_c": [None, 1, 4, 2.5, 0.25],
    "gamma_d": [1, 2],
    "num_nearest_neighbors": [1, 3],
    "num_hard_negative_features": [0, 3],
    "radius": [0, 1e-5, 2, 1000],
    "alpha": [0, 0.1],
    "bank": ["kmeans", "ema", "mean"],
    "whitening": [None, 0, 0.5, 1],
    "score": ["local", "calibrated", "nearest", "softmin"],
    "search": ["exact", "two_level"],
    "sigma": [1e-300, 0.5, 4],
    "pre_trained": [False],
    "learn_radius": [True, False],
    "center_view": [True, False],
    "lr": [1e-3],
    "weight_decay": [0, 5e-4],
    "seed": [0, 42],
    "false_alarm_rate": [0.01, 0.49],
    "feature_budget": [0, 1.5],
}
WRONG = {
    "backbone": ["", None, 18],
    "layers": [[], "layer2", ["layer2", "layer2"], [2]],
    "weights_path": ["", 1, True],
    "pre_processor": [None, 1, "yes"],
    "post_processor": [None, 0],
    "evaluator": [None, torch.nn.Identity()],
    "visualizer": [None, "image"],
    "image_size": [0, -1, 64.0, True, [64], [64, 64, 3], "64", [64, 0]],
    "center_crop_size": [0, [64], [64.0, 64], False],
    "gamma_c": [0, -1, float("nan"), "2", True],
    "gamma_d": [0, -1, 1.5],
    "num_nearest_neighbors": [0, -3, 2.0],
    "num_hard_negative_features": [-1, 0.5, False],
    "radius": [-1e-9, 1001, math.nan, math.inf, "0"],
    "alpha": [-0.1, 2**64, math.nan],
    "bank": ["median", None],
    "whitening": [-0.1, 1.5, math.nan, "random", True],
    "score": ["max"],
    "search": ["flat"],
    "sigma": [0, -4, 1e9],
    "pre_trained": [None, 1],
    "learn_radius": [None, "no"],
    "center_view": [None, 224, "yes"],
    "lr": [0, 2**64, math.inf],
    "weight_decay": [-1, 2**64],
    "seed": [-1, 0.5, None],
    "false_alarm_rate": [0, 0.5, -0.1, math.nan, "1%"],
    "feature_budget": [-1, math.nan],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RIGHT.items() for value in values])
def test_values_within_range_pass(name, value):
    check_hyperparameters(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_the_constructor_names_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be ") as raised:
        Cfa(**{"backbone": "test_resnet.r160_in1k", "pre_trained": False, name: value})
    assert str(raised.value).endswith(f", but is {value!r}")


def test_every_argument_of_the_constructor_has_a_rule_and_cases():
    arguments = inspect.signature(Cfa).parameters
    named = {name for name, argument in arguments.items() if argument.kind is not argument.VAR_KEYWORD}
    assert set(RULES) == set(RIGHT) == set(WRONG) == named
    check_hyperparameters(**{name: arguments[name].default for name in named})


@given(
    name=st.sampled_from(sorted(WRONG)),
    value=st.one_of(st.text(), st.binary(), st.lists(st.integers()), st.complex_numbers()),
)
def test_values_of_any_type_are_accepted_or_named(name, value):
    if RULES[name][1](value):
        return
    with pytest.raises(ValueError, match=f"^{name} must be"):
        check_hyperparameters(**{name: value})


def test_only_k_means_gives_more_centers_than_patches():
    check_hyperparameters(gamma_c=0.5, bank="kmeans")
    with pytest.raises(ValueError, match=r"gamma_c must be at least 1 where bank is 'mean', .* but is 0\.5"):
        check_hyperparameters(gamma_c=0.5, bank="mean")


def test_a_bank_smaller_than_its_targets_is_refused():
    check_neighbors(6, 3, 3)
    with pytest.raises(ValueError, match="at most the memory bank's size of 5 centres, but is 3 \\+ 3"):
        check_neighbors(5, 3, 3)


def test_a_descriptor_without_channels_is_refused():
    tiny = partial(Cfa, "test_resnet.r160_in1k", pre_trained=False)
    channels = sum(tiny().model.patch_features.channels)
    assert tiny(gamma_d=channels).model.descriptor.width == 1
    with pytest.raises(ValueError, match=rf"^gamma_d must be at most {channels}, .* but is {channels + 1}"):
        tiny(gamma_d=channels + 1)


@pytest.mark.parametrize("name", ["image_size", "center_crop_size"])
def test_sizes_beside_a_pre_processor_are_refused(name):
    with pytest.raises(ValueError, match=f"must not be given beside a pre_processor.*{name} is 64"):
        check_hyperparameters(pre_processor=False, **{name: 64})


def test_what_comes_from_numpy_is_saved_as_plain_values():
    """A checkpoint loads only what is plain, and a sweep's values are often NumPy's."""
    model = Cfa(
        np.str_("test_resnet.r160_in1k"),
        pre_trained=False,
        layers=np.array(["layer2"]),
        num_nearest_neighbors=np.int64(2),
        lr=np.float64(1e-3),
        whitening=np.float32(0.25),
        center_view=np.bool_(True),
        image_size=np.array([64, 96]),
    )
    file = io.BytesIO()
    torch.save(dict(model.hparams), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert (saved["layers"], saved["image_size"], saved["center_view"]) == (["layer2"], [64, 96], True)
    assert (saved["num_nearest_neighbors"], saved["lr"], saved["whitening"]) == (2, 1e-3, 0.25)
    assert model.model.center_view is True
