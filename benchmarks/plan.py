"""What the speed benchmark measures, in which order, and with which settings."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

OURS, ANOMALIB = "ours", "anomalib"
SIDES = (OURS, ANOMALIB)
SEARCH_KINDS = ("exact", "ivf", "hnsw")


@dataclass(frozen=True)
class Measurement:
    """One process.

    Attributes:
        part: The part of the benchmark that it belongs to.
        label: What is measured; that of the other side has the same.
        side: Whose ``Cfa`` is measured.
        kind: The function of ``measure.py``.
        settings: What that function wants to know.
        round: Counts repetitions; both sides of a round are neighbours in time.
    """

    part: str
    label: str
    side: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    round: int = 0


@dataclass(frozen=True)
class Scale:
    """How much is measured: everything, or a quick look.

    ``training_images`` and ``epochs`` are the whole fit's, of which ``anomalib_steps`` are measured. An inference
    is that of a backbone, at a size in pixels, with a gamma_c. Where it is not ``thorough``, figures are left out that
    nothing is compared with.
    """

    rounds: int = 2
    fit_rounds: int = 1
    size: int = 256
    training_images: int = 300
    epochs: int = 30
    batch_sizes: tuple[int, ...] = (4, 32)
    anomalib_steps: int = 3
    inferences: tuple[tuple[str, int, int], ...] = (
        ("resnet18", 256, 1),
        ("resnet18", 256, 4),
        ("wide_resnet50_2", 224, 1),
        ("wide_resnet50_2", 224, 4),
    )
    repeats: int = 30
    growth_sizes: tuple[int, ...] = (128, 256, 512, 1024)
    growth_kinds: tuple[str, ...] = SEARCH_KINDS
    recall_images: int = 100
    recall_epochs: int = 5
    recall_gammas: tuple[int, ...] = (1, 4)
    recall_queries: int = 4
    thorough: bool = True

    @property
    def images(self) -> int:
        """How many images there must be."""
        return max(self.training_images, self.recall_images)


FULL = Scale()
QUICK = Scale(
    rounds=1,
    fit_rounds=1,
    size=128,
    training_images=24,
    epochs=3,
    batch_sizes=(8,),
    anomalib_steps=2,
    inferences=(("resnet18", 128, 4),),
    repeats=10,
    growth_sizes=(64, 128),
    growth_kinds=("ivf",),
    recall_images=24,
    recall_epochs=1,
    recall_gammas=(1,),
    recall_queries=2,
    thorough=False,
)

RESNET = {"backbone": "resnet18", "gamma_c": 1}
# Anomalib's own Cfa reads no other layers, and its bank holds each position's mean, or K-means of these.
SAME_LAYERS = {"layers": ["layer1", "layer2", "layer3"]}
SAME_BANK = {**SAME_LAYERS, "bank": "mean"}


def training(scale: Scale) -> Iterator[Measurement]:
    """Training steps, the whole fit and its memory, at gamma_c = 1.

    The largest batch is measured in the whole fit. Anomalib's is cut off after some steps, and so is ours where each
    step sees its images for the first time: no feature is kept.
    """
    *smaller, largest = scale.batch_sizes
    for batch_size in smaller:
        few = {**RESNET, "size": scale.size, "batch_size": batch_size, "image_count": 6 * batch_size}
        for number in range(scale.rounds):
            for measurement in _steps(few, batch_size, steps=2 * scale.anomalib_steps):
                yield replace(measurement, round=number)
            kept = {**few, "epochs": 3, "options": SAME_BANK}
            yield Measurement("training", f"kept, batch {batch_size}", OURS, "fit", kept, number)
    whole = {**RESNET, "size": scale.size, "batch_size": largest, "image_count": scale.training_images}
    for number in range(scale.fit_rounds):
        for measurement in _steps(whole, largest, steps=scale.anomalib_steps):
            yield replace(measurement, round=number)
        kept = {**whole, "epochs": scale.epochs, "options": SAME_BANK}
        yield Measurement("training", f"kept, batch {largest}", OURS, "fit", kept, number)
    defaults = {**whole, "epochs": scale.epochs}
    yield Measurement("training", f"all defaults, batch {largest}", OURS, "fit", defaults)


def _steps(settings: dict[str, Any], batch_size: int, steps: int) -> Iterator[Measurement]:
    settings = {**settings, "epochs": 100, "steps": steps}
    first = {**settings, "options": {**SAME_BANK, "feature_budget": 0}}
    yield Measurement("training", f"first time, batch {batch_size}", OURS, "fit", first)
    yield Measurement("training", f"first time, batch {batch_size}", ANOMALIB, "fit", settings)


def k_means(scale: Scale) -> Iterator[Measurement]:
    """K-means of one mean bank to a quarter."""
    bank = {**RESNET, "size": scale.size, "batch_size": 8, "image_count": 24, "epochs": 1, "steps": 1}
    yield Measurement("k_means", "points", OURS, "fit", {**bank, "options": SAME_BANK, "state": "points"})
    for number in range(scale.rounds):
        for side in SIDES:
            yield Measurement("k_means", "K-means", side, "k_means", {"gamma_c": 4, "state": "points"}, number)


def inference(scale: Scale) -> Iterator[Measurement]:
    """Prediction of one image: by the layers that anomalib's own Cfa reads, and by the default ones."""
    for backbone, size, gamma_c in scale.inferences:
        settings = {"backbone": backbone, "size": size, "gamma_c": gamma_c}
        label = f"{backbone}, {size} x {size}, gamma_c = {gamma_c}"
        rivals = [(label, side, _bank(gamma_c)) for side in SIDES]
        compared = [*rivals, (f"{label}, default layers", OURS, {})]
        for name, side, options in compared:
            short = {**settings, **options, "batch_size": 4, "image_count": 16, "epochs": 1, "steps": 2}
            state = f"inference-{name}-{side}"
            yield Measurement("inference", f"fit, {name}", side, "fit", {**short, "state": state})
        for number in range(scale.rounds):
            for name, side, options in compared:
                timed = {**settings, **options, "state": f"inference-{name}-{side}", "repeats": scale.repeats}
                yield Measurement("inference", name, side, "inference", timed, number)


def _bank(gamma_c: int) -> dict[str, Any]:
    """The default bank where it is small. As large as an image has patches of stride 4, its K-means takes long."""
    return {"options": SAME_BANK if gamma_c == 1 else SAME_LAYERS}


def growth(scale: Scale) -> Iterator[Measurement]:
    """A training step and prediction at growing resolution, gamma_c = 1: patches and bank grow alike."""
    for size in scale.growth_sizes:
        common = {**RESNET, "size": size}
        short = {**common, "batch_size": 1, "image_count": 2, "epochs": 100, "steps": 4}
        for kind in scale.growth_kinds:
            state = {"state": f"growth-{size}-ours"} if kind == scale.growth_kinds[0] else {}
            settings = {**short, **state, "options": {**SAME_BANK, "search": kind}}
            yield Measurement("growth", f"training, {kind}, batch 1", OURS, "fit", settings)
        settings = {**short, "steps": 2, "state": f"growth-{size}-anomalib"}
        yield Measurement("growth", "training, batch 1", ANOMALIB, "fit", settings)
        if scale.thorough:
            for side in SIDES:
                timed = {**common, "state": f"growth-{size}-{side}", "repeats": 5, "warm_up": 1}
                timed |= {"options": SAME_LAYERS}
                yield Measurement("growth", "inference", side, "inference", timed)
    if not scale.thorough:
        return
    largest = {**RESNET, "size": scale.growth_sizes[-1], "batch_size": 4, "image_count": 4, "epochs": 100, "steps": 2}
    yield Measurement("growth", "training, default, batch 4", OURS, "fit", {**largest, "options": SAME_BANK})


def recall(scale: Scale) -> Iterator[Measurement]:
    """Recall of each index against brute force, before and after training."""
    for gamma_c in scale.recall_gammas:
        settings = {"backbone": "resnet18", "gamma_c": gamma_c, "size": scale.size, "options": SAME_LAYERS}
        trained = {**settings, "batch_size": 4, "image_count": scale.recall_images, "epochs": scale.recall_epochs}
        states = {state: f"recall-{gamma_c}-{state}" for state in ("untrained", "trained")}
        left = {"untrained": states["untrained"], "state": states["trained"]}
        yield Measurement("recall", f"fit, gamma_c = {gamma_c}", OURS, "fit", {**trained, **left, **_bank(gamma_c)})
        for name in states if scale.thorough else ("trained",):
            searched = {"state": states[name], "k": 6, "search_kinds": SEARCH_KINDS, "queries": scale.recall_queries}
            label = f"{name}, gamma_c = {gamma_c}"
            yield Measurement("recall", label, OURS, "recall", {**settings, **searched, "repeats": 5})


PARTS = {"training": training, "k_means": k_means, "inference": inference, "growth": growth, "recall": recall}
