"""Any arguments: a clear error before any work, or a model that is fitted and gives finite scores."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from soak import cases
from tiny import fit_to_noise, noise, tiny_cfa

from anomalib_cfa.bank.search import SEARCH_KINDS

LAYERS = ["layer1", "layer2", "layer3", "layer1.0", "layer2.0", "layer3.0"]

SENSIBLE = {
    "gamma_c": st.none() | st.integers(1, 20) | st.floats(0.05, 20),
    "gamma_d": st.integers(1, 20),
    "num_nearest_neighbors": st.integers(1, 12),
    "num_hard_negative_features": st.integers(0, 12),
    "radius": st.floats(0, 1e3),
    "learn_radius": st.booleans(),
    "layers": st.none() | st.lists(st.sampled_from(LAYERS), max_size=4),
    "bank": st.sampled_from(["kmeans", "mean", "ema"]),
    "beta": st.none() | st.floats(0.01, 1),
    "alpha": st.floats(0, 10),
    "nu": st.floats(1e-6, 1e3),
    "search": st.sampled_from(SEARCH_KINDS),
    "score": st.sampled_from(["local", "calibrated", "nearest", "softmin"]),
    "sigma": st.floats(0.1, 8),
    "seed": st.integers(0, 2**31 - 1),
    "whitening": st.none() | st.floats(0, 1),
    "false_alarm_rate": st.floats(1e-6, 0.499),
    "image_size": st.integers(8, 100) | st.lists(st.integers(8, 100), min_size=2, max_size=2),
    "center_crop_size": st.none() | st.integers(8, 100),
}
# Image sizes are bounded by the memory there is, and nothing else.
SMALL = st.none() | st.booleans() | st.integers(-100, 100) | st.floats(-100, 100)
ANYTHING = SMALL | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.lists(SMALL, max_size=3)


def fits_and_scores(arguments) -> bool:
    """Whether a model is made, fitted, takes a step, and scores finitely, rather than refused with a message."""
    try:
        model = fit_to_noise(tiny_cfa(**arguments))
        model.train()
        squared, *_ = model.model.targets(model.model.pyramid(noise(2, *(model.input_size or (64, 64)))))
        loss = sum(model.loss(squared, model.model.radius))
        loss.backward()
        model.eval()
        with torch.no_grad():
            found = model(noise(2, 40, 60, seed=2))
    except ValueError as error:
        assert str(error)
        return False
    assert found.pred_score.isfinite().all()
    assert found.anomaly_map.isfinite().all()
    assert loss.isfinite()
    return True


@cases(quick=60, soak=1000)
@given(arguments=st.fixed_dictionaries({}, optional=SENSIBLE))
def test_values_within_their_ranges_give_a_model_or_say_why_not(arguments):
    fits_and_scores(arguments)


@cases(quick=60, soak=1000)
@given(name=st.sampled_from(sorted(SENSIBLE)), sensible=st.fixed_dictionaries({}, optional=SENSIBLE), data=st.data())
def test_values_of_any_type_are_refused_by_name_or_give_a_model(name, sensible, data):
    small = name in {"image_size", "center_crop_size"}
    fits_and_scores(sensible | {name: data.draw(SMALL | st.lists(SMALL, max_size=3) if small else ANYTHING)})
