"""One run of the comparison, made in a process of its own: fit a model, time it, test it.

``python comparison_run.py TASK RESULT`` reads a JSON file that says what to run, and writes one with what was measured.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, Evaluator
from anomalib.models import Cfa, Padim, Patchcore
from lightning.pytorch import seed_everything
from metrics import NormalFalsePositivesAUPRO, RawAUROC
from models import build_model, load_image
from stopwatch import alternate, peak_memory
from timm.models import load_state_dict

Task = dict[str, Any]


def main() -> None:
    """Carry out the task that the command line names."""
    task_file, result_file = map(Path, sys.argv[1:])
    task = json.loads(task_file.read_text())
    torch.set_num_threads(task["threads"])
    result_file.write_text(json.dumps(run(task)))


def run(task: Task) -> dict[str, Any]:
    """Fit, time one image, test."""
    seed_everything(task["seed"], verbose=False)
    model = build(task)
    datamodule = Images(task)
    arguments: dict[str, Any] = {} if task.get("epochs") is None else {"max_epochs": task["epochs"]}
    engine = Engine(
        accelerator="cpu",
        devices=1,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=task["work"],
        **arguments,
    )
    began = time.perf_counter()
    engine.fit(model, datamodule=datamodule)
    seconds, peak = time.perf_counter() - began, peak_memory()

    model.eval()
    image = load_image(model, next(iter(sorted(Path(task["root"], "train/good").iterdir()))))
    with torch.inference_mode():
        (latency,) = alternate([lambda: model.model(image)], repeats=30, warm_up=3)
    (metrics,) = engine.test(model, datamodule=datamodule, verbose=False)
    return {
        "fit_s": seconds,
        "fit_peak_bytes": peak,
        "latency_s": median(latency),
        "bank": bank_size(model),
        "training_images": len(datamodule.train_data),
        "epochs": engine.trainer.current_epoch,
        "test_images": len(datamodule.test_data),
        **metrics,
        **environment(),
    }


def build(task: Task) -> Any:  # noqa: ANN401 - one of four classes
    """The task's model, its backbone's weights from the file, judged by raw scores."""
    pixels = ["anomaly_map", "gt_mask"]
    evaluator = Evaluator(
        test_metrics=[
            RawAUROC(["pred_score", "gt_label"], "image_"),
            RawAUROC(pixels, "pixel_"),
            AUPRO(pixels, "pixel_"),
            NormalFalsePositivesAUPRO(pixels, "pixel_"),
        ]
    )
    if task["model"].endswith("Cfa"):
        side = "ours" if task["model"] == "this Cfa" else "anomalib"
        if Cfa.__module__.startswith("anomalib_cfa") != (side == "ours"):
            sys.exit(f"{Cfa.__module__}.Cfa is not {task['model']}")
        model = build_model(
            {"backbone": "resnet18", **task, "side": side, "options": {"seed": task["seed"], **task.get("options", {})}}
        )
    else:
        shared: dict[str, Any] = {
            "backbone": "resnet18",
            "pre_trained": False,  # which would ask the hub
            "pre_processor": Patchcore.configure_pre_processor((task["size"], task["size"])),
            "visualizer": False,
        }
        is_patchcore = task["model"] == "PatchCore"
        model = Patchcore(**shared, coreset_sampling_ratio=task["coreset"]) if is_patchcore else Padim(**shared)
        loaded = model.model.feature_extractor.feature_extractor.load_state_dict(
            load_state_dict(task["weights_path"]), strict=False
        )
        if loaded.missing_keys:
            sys.exit(f"the weights lack {loaded.missing_keys}")
    model.evaluator = evaluator
    model.post_processor = None  # it would clamp scores to [0, 1]
    return model


class Images(Folder):
    """A data set in MVTec AD's layout with images of any format, or some of it, spread evenly.

    Args:
        task: Names the folder, and how much of it.
    """

    def __init__(self, task: Task) -> None:
        root = Path(task["root"])
        kinds = sorted(path.name for path in (root / "test").iterdir() if path.name != "good")
        super().__init__(
            name="comparison",
            root=root,
            normal_dir="train/good",
            normal_test_dir="test/good",
            abnormal_dir=[f"test/{kind}" for kind in kinds],
            mask_dir=[f"ground_truth/{kind}" for kind in kinds],
            num_workers=0,
            val_split_mode="none",
        )
        self.training_images, self.test_step = task["training_images"], task["test_step"]

    def _setup(self, _stage: str | None = None) -> None:
        super()._setup(_stage)
        count = len(self.train_data)
        step = max(1, count // (self.training_images or count))
        self.train_data = self.train_data.subsample(range(0, count, step))
        self.test_data = self.test_data.subsample(range(0, len(self.test_data), self.test_step))


def bank_size(model: Any) -> int | None:  # noqa: ANN401 - one of four classes
    """How many vectors a patch is compared with; PaDiM, with a Gaussian of its own for each patch, has none."""
    bank = getattr(model.model, "memory_bank", None)
    if bank is None or isinstance(bank, list):
        return None
    if hasattr(bank, "centers"):
        return len(bank.centers)
    return int(bank.shape[1] if type(model).__name__ == "Cfa" else bank.shape[0])


def environment() -> dict[str, Any]:
    """Machine and versions."""
    from anomalib_cfa.benchmark.provenance import machine, versions  # noqa: PLC0415 - after the choice of a Cfa

    return {"machine": machine("cpu"), "versions": versions()}


if __name__ == "__main__":
    main()
