"""One run of the ablation: a variant, fitted through anomalib's engine and judged."""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib_cfa.views import central_view
from feature_cache import FeatureCache
from held_out import datamodule, lay_out
from judging import judge
from lightning.pytorch import Callback
from variants import Variant

from anomalib_cfa import Cfa
from anomalib_cfa.demo.render import render_mvtec

SCORES = ("calibrated", "nearest", "softmin")


def carry_out(key: dict[str, Any], variant: Variant, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit a variant and judge it.

    Args:
        key: All that decides the result.
        variant: The same, as far as it is the variant's.
        arguments: The command line's: where things lie.

    Returns:
        Seconds of the fit (with the judging in between), the radius, the bank's size, and the rows of :func:`judge`.
    """
    source = Path(arguments.data[key["data"]] or rendered(key["data"], arguments))
    images = sorted(path for path in (source / "train/good").iterdir() if path.is_file())
    images = images[:: math.ceil(len(images) / arguments.images)]
    folder = arguments.output / "data" / f"{key['data']}-{len(images)}-fold{key['seed']}"
    lay_out(images, folder, key["seed"])

    model, held_out = build(key, arguments), datamodule(folder, variant.batch_size)
    central = fit_central(key, variant, arguments, held_out) if variant.central_training else model
    scorings = [(score, sigma) for score in SCORES for sigma in variant.sigmas]
    judged: list[dict[str, Any]] = []

    def judge_after(epochs: int) -> None:
        sides = {"validation": held_out}
        if key["test"]:
            sides["test"] = datamodule(source, 1)
        for side, module in sides.items():
            rows = judge(model, module, scorings, central)
            judged.extend({"side": side, "epochs": epochs, **row} for row in rows)

    began = time.perf_counter()
    fit(model, held_out, variant, arguments, Between(judge_after, variant.epochs[:-1]))
    seconds = time.perf_counter() - began
    judge_after(variant.epochs[-1])
    radius = float(model.model.radius.detach())
    return {
        "seconds": round(seconds, 1),
        "radius": radius,
        "centers": len(model.model.memory_bank.centers),
        "judged": judged,
    }


def build(key: dict[str, Any], arguments: argparse.Namespace, **others: Any) -> Cfa:  # noqa: ANN401
    """The key's model, some options excepted, its backbone's features kept on disk."""
    weights = arguments.weights_path
    options = {**key["variant"]["options"], "pre_trained": weights is not None, **others}
    model = Cfa(**options, weights_path=weights and str(weights.resolve()), evaluator=False, visualizer=False)
    FeatureCache(arguments.output / "features", str(key["weights"])).attach(model)
    return model


def fit(model: Cfa, module: Folder, variant: Variant, arguments: argparse.Namespace, *callbacks: Callback) -> None:
    """Fit through anomalib's engine, for as many epochs as the variant is judged after at last."""
    schedule = [CosineSchedule()] if variant.schedule == "cosine" else []
    engine = Engine(
        accelerator="cpu",
        devices=1,
        max_epochs=variant.epochs[-1],
        max_steps=-1 if variant.epochs[-1] else 0,
        limit_val_batches=0,
        callbacks=[*callbacks, *schedule],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=arguments.output / "runs",
    )
    engine.fit(model, datamodule=module)


def fit_central(key: dict[str, Any], variant: Variant, arguments: argparse.Namespace, module: Folder) -> Cfa:
    """A model of the images' central view alone."""
    size = key["variant"]["options"]["image_size"]
    model = build(key, arguments, center_crop_size=central_view(torch.empty(size, size)).shape[-1])
    fit(model, module, variant, arguments)
    return model.eval()


def rendered(category: str, arguments: argparse.Namespace) -> Path:
    """A category of the demo, rendered once."""
    root: Path = arguments.output / "data" / f"rendered-{arguments.images}"
    if not (root / f"{category}-complete").exists():
        render_mvtec(root, [category], num_train=arguments.images, num_good=40, num_defective=20)
        (root / f"{category}-complete").touch()
    return root / category


class Between(Callback):
    """Calls a function after some of the epochs, the last one excepted."""

    def __init__(self, call: Any, epochs: tuple[int, ...]) -> None:  # noqa: ANN401
        self.call = call
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401, ARG002
        """Before an epoch, so that all that ends the one before is done."""
        if trainer.current_epoch in self.epochs:
            self.call(trainer.current_epoch)


class CosineSchedule(Callback):
    """Lowers the learning rate to nothing along half a cosine."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Set the step's learning rate."""
        done = trainer.global_step / trainer.estimated_stepping_batches
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = pl_module.hparams["lr"] * (1 + math.cos(math.pi * done)) / 2
