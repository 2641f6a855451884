import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalib_cfa.hyperparameters import check_hyperparameters, check_neighbors

RIGHT = {
    "gamma_c": [None, 1, 4, 2.5, 0.25],
    "gamma_d": [1, 2],
    "num_nearest_neighbors": [1, 3],
    "num_hard_negative_features": [0, 3],
    "radius": [0, 1e-5, 2],
    "alpha": [0, 0.1],
    "bank": ["kmeans", "ema", "mean"],
    "whitening": [None, 0, 0.5, 1],
    "score": ["local", "calibrated", "nearest", "softmin"],
    "search": ["exact", "two_level"],
    "sigma": [0.5, 4],
    "pre_trained": [False],
    "learn_radius": [True, False],
    "center_view": [True, False],
    "lr": [1e-3],
    "weight_decay": [0, 5e-4],
    "seed": [0, 42],
    "feature_budget": [0, 1.5],
}
WRONG = {
    "gamma_c": [0, -1, float("nan"), "2", True],
    "gamma_d": [0, -1, 1.5],
    "num_nearest_neighbors": [0, -3, 2.0],
    "num_hard_negative_features": [-1, 0.5, False],
    "radius": [-1e-9, math.nan, math.inf, "0"],
    "alpha": [-0.1, math.nan],
    "bank": ["median", None],
    "whitening": [-0.1, 1.5, math.nan, "random", True],
    "score": ["max"],
    "search": ["flat"],
    "sigma": [0, -4],
    "pre_trained": [None, 1],
    "learn_radius": [None, "no"],
    "center_view": [None, 224, "yes"],
    "lr": [0, math.inf],
    "weight_decay": [-1],
    "seed": [-1, 0.5, None],
    "feature_budget": [-1, math.nan],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RIGHT.items() for value in values])
def test_values_within_range_pass(name, value):
    check_hyperparameters(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, but is {value!r}".replace("(", r"\(")):
        check_hyperparameters(**{name: value})


@given(
    name=st.sampled_from(sorted(WRONG)),
    value=st.one_of(st.text(), st.binary(), st.lists(st.integers()), st.complex_numbers()),
)
def test_values_of_any_type_are_accepted_or_named(name, value):
    if value in RIGHT[name]:
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
