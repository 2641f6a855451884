"""What the ablation varies: groups of variants, each compared with the first of its group."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from anomalib_cfa import Cfa


@dataclass(frozen=True)
class Variant:
    """A way to fit and score.

    Attributes:
        name: What is varied.
        options: The model's arguments where they are not the base's.
        epochs: After how many the model is judged; it is trained for the last.
        batch_size: Of training.
        schedule: Of the learning rate, ``"constant"`` or ``"cosine"``.
        sigmas: Of the map's smoothing, in pixels.
        scale: Factor on the size of the images.
        central_training: Whether a ``center_view`` is scored by a model that is trained on it alone.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    epochs: tuple[int, ...] = (0,)
    batch_size: int = 32
    schedule: str = "constant"
    sigmas: tuple[float, ...] = (4.0,)
    scale: float = 1.0
    central_training: bool = False

    def model_options(self, size: int, seed: int) -> dict[str, Any]:
        """All of the model's arguments that matter for accuracy, defaults included."""
        left_out = {"pre_processor", "post_processor", "evaluator", "visualizer", "weights_path", "feature_budget"}
        parameters = inspect.signature(Cfa).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items() if name not in left_out}
        options = {**defaults, **BASE, "image_size": round(size * self.scale), "seed": seed, **self.options}
        if options["center_crop_size"] is True:
            options["center_crop_size"] = size
        return options


LAYERS_1_3, LAYERS_2_3 = ["layer1", "layer2", "layer3"], ["layer2", "layer3"]
BASE: dict[str, Any] = {"backbone": "resnet18", "layers": LAYERS_2_3, "gamma_c": 1}
UNTRAINED, DEFAULT, FEW, MORE = (0,), (3,), (0, 1, 3), (0, 1, 3, 10)


def _each(name: str, values: Sequence[Any], epochs: tuple[int, ...] = UNTRAINED, **shared: Any) -> list[Variant]:  # noqa: ANN401
    """A variant for each value of an option."""
    return [Variant(f"{name}={value}", {name: value, **shared}, epochs) for value in values]


def _layers(epochs: tuple[int, ...]) -> list[Variant]:
    choices = {"2-3": (LAYERS_2_3, (1, 0.25, 4)), "1-3": (LAYERS_1_3, (4, 1))}
    return [
        Variant(f"layers {levels}, gamma_c={gamma_c}", {"layers": layers, "gamma_c": gamma_c}, epochs)
        for levels, (layers, gammas) in choices.items()
        for gamma_c in gammas
    ]


_TRAINING = Variant("batch 32, lr=1e-3", {"lr": 1e-3}, MORE)
GROUPS: dict[str, list[Variant]] = {
    "layers": _layers(DEFAULT),
    "all layers": _each("layers", [LAYERS_2_3, LAYERS_1_3, ["layer1", "layer2"], ["layer2"], ["layer3"]]),
    "training": [
        _TRAINING,
        replace(_TRAINING, name="batch 32, lr=1e-4", options={"lr": 1e-4}),
        replace(_TRAINING, name="batch 32, lr=1e-3, cosine", schedule="cosine", epochs=(10,)),
        replace(_TRAINING, name="batch 4, lr=1e-3", batch_size=4),
        replace(_TRAINING, name="batch 4, lr=1e-4", batch_size=4, options={"lr": 1e-4}),
        replace(_TRAINING, name="batch 4, lr=1e-3, cosine", batch_size=4, schedule="cosine", epochs=(10,)),
    ],
    "bank": [
        *_each("bank", ["kmeans", "mean", "ema"]),
        *_each("beta", [0.01, 0.1], bank="ema"),
    ],
    "bank, random start": [
        *_each("bank", ["kmeans", "mean", "ema"], FEW, descriptor_start="random"),
        *_each("beta", [0.01, 0.1], FEW, descriptor_start="random", bank="ema"),
    ],
    # Where centres are many, the score is only calibrated well by whole epochs: before the first 64 images must do.
    "gamma_c": _each("gamma_c", [1, 0.25, 2, 4, 16], DEFAULT),
    "gamma_d": _each("gamma_d", [1, 2, 4]),
    "whitening": _each("whitening", [0.5, 1.0, 0.75, 0.25, 0.0], DEFAULT),
    "start": _each("descriptor_start", ["whitened", "random"], MORE),
    # A bank that is large enough for an index, trained so that the descriptor moves.
    "search": _each("search", ["exact", "ivf", "hnsw"], (1, 3), layers=LAYERS_1_3, bank="mean", lr=1e-3),
    "radius": [
        *_each("radius", [1e-5, 0.3, 0.6], (3,)),
        *_each("learn_radius", [False], (3,)),
        *_each("learn_radius", [False], (3,), radius=0.6),
    ],
    "alpha": _each("alpha", [0.1, 0.0, 0.5], (3,), radius=0.6),
    "size": [Variant(f"{scale:g} x size", scale=scale) for scale in (1.0, 1.5, 2.0)],
    "crop": [Variant("resize"), Variant("resize by 8/7, and crop", {"center_crop_size": True}, scale=8 / 7)],
    "views": [
        Variant("the whole image", epochs=DEFAULT),
        Variant("and its centre, one training", {"center_view": True}, DEFAULT),
        Variant("and its centre, a training each", {"center_view": True}, DEFAULT, central_training=True),
    ],
    "sigma": [Variant("untrained", sigmas=(4.0, 1.0, 2.0, 3.0, 6.0))],
}
