"""One measurement of the deployment benchmark, made in a process of its own.

``python deploy_measure.py TASK RESULT`` reads a JSON file that says what to measure, and writes what was measured to
another. ``deploy.py`` starts it; whose ``Cfa`` it loads is decided by the environment variable
``ANOMALIB_CFA_REGISTER``.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import Folder
from anomalib.deploy import CompressionType
from anomalib.models import Cfa
from models import build_model
from runtimes import latency, limit_threads, load, size_on_disk
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

Task = dict[str, Any]
Result = dict[str, Any]


def main() -> None:
    """Carry out the task that the command line names."""
    task_file, result_file = map(Path, sys.argv[1:])
    task = json.loads(task_file.read_text())
    limit_threads(task["threads"])
    if Cfa.__module__.startswith("anomalib_cfa") != (task["side"] == "ours"):
        sys.exit(f"{Cfa.__module__}.Cfa is not the one of {task['side']}")
    result_file.write_text(json.dumps(MEASUREMENTS[task["kind"]](task)))


def trained_model(task: Task) -> Any:  # noqa: ANN401 - anomalib's Cfa is not ours
    """The checkpoint's model; it gives scores and maps as they are, before normalization."""
    return without_post_processing(Cfa.load_from_checkpoint(task["ckpt_path"]).eval())


def without_post_processing(model: Any) -> Any:  # noqa: ANN401
    """Have a model give scores and maps only, not normalized."""
    model.post_processor.enable_normalization = model.post_processor.enable_thresholding = False
    return model


def datamodule(task: Task) -> Folder:
    """The images, laid out as MVTec AD lays out a category."""
    root = Path(task["data"])
    defects = sorted(folder.name for folder in (root / "test").iterdir() if folder.name != "good")
    module = Folder(
        name="deploy",
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{defect}" for defect in defects],
        mask_dir=[f"ground_truth/{defect}" for defect in defects],
        num_workers=0,
        val_split_mode="none",
    )
    module.setup()
    return module


def test_images(task: Task, transform: Any) -> Iterator[tuple[Tensor, bool, Tensor]]:  # noqa: ANN401
    """Image, label and mask of each test image, or of some of them; the masks are of the map's size."""
    dataset = datamodule(task).test_data
    for index in range(0, len(dataset), task["every"]):
        item = dataset[index]
        _, mask = transform(item.image, item.gt_mask)
        yield item.image, bool(item.gt_label), mask.squeeze() > 0


def export(task: Task) -> Result:
    """Export the trained model in one way."""
    model, root = trained_model(task), Path(task["root"])
    size = tuple(task["input_size"]) if task.get("input_size") else None
    compression = task.get("compression") and CompressionType(task["compression"])
    if task["format"] == "onnx":
        path = model.to_onnx(root, input_size=size)
    elif task["format"] == "backbone":
        path = export_backbone(model, root)
    else:
        images = datamodule(task) if compression in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ} else None
        path = model.to_openvino(root, input_size=size, compression_type=compression, datamodule=images)
    return {"path": str(path), "bytes": size_on_disk(path), "size": list(model.input_size)}


def export_backbone(model: Any, root: Path) -> Path:  # noqa: ANN401
    """Export the frozen network alone, for images of the model's size, to ONNX, and to OpenVINO beside it."""
    import openvino  # noqa: PLC0415 - optional

    path = root / "backbone.onnx"
    root.mkdir(parents=True, exist_ok=True)
    network = model.model.patch_features.network if hasattr(model.model, "patch_features") else None
    image = torch.rand(1, 3, *model.input_size)
    torch.onnx.export(network, (image,), path, dynamo=True, opset_version=18, external_data=False, verbose=False)
    openvino.save_model(openvino.convert_model(path), path.with_suffix(".xml"), compress_to_fp16=False)
    return path


def reference(task: Task) -> Result:
    """Predict the test images with PyTorch, as all others are compared with it."""
    model = trained_model(task)
    scores, maps, labels, masks = [], [], [], []
    with torch.inference_mode():
        for image, label, mask in test_images(task, model.pre_processor.transform):
            output = model(image[None])
            scores.append(output.pred_score)
            maps.append(output.anomaly_map)
            labels.append(label)
            masks.append(mask)
    found = {"scores": torch.cat(scores), "maps": torch.cat(maps), "labels": torch.tensor(labels)}
    torch.save({**found, "masks": torch.stack(masks)}, task["reference"])
    return judge(found["scores"], found["maps"], task)


def agreement(task: Task) -> Result:
    """Predict the test images with a runtime."""
    transform = Cfa.load_from_checkpoint(task["ckpt_path"]).pre_processor.transform
    predict = load(Path(task["path"]), task.get("precision"), task["threads"])
    scores, maps = [], []
    for image, _, _ in test_images(task, transform):
        output = predict(np.ascontiguousarray(image[None].numpy(), dtype=np.float32))
        scores.append(torch.from_numpy(output["pred_score"].copy()).flatten())
        maps.append(torch.from_numpy(output["anomaly_map"].copy()))
    return judge(torch.cat(scores), torch.cat(maps), task)


def judge(scores: Tensor, maps: Tensor, task: Task) -> Result:
    """Compare predictions with the reference's, and with the truth."""
    expected = torch.load(task["reference"], weights_only=True)
    threshold = torch.load(task["ckpt_path"], weights_only=True)["state_dict"]["post_processor._image_threshold"]
    largest = expected["maps"].abs().amax(dim=(-2, -1), keepdim=True)
    difference = (maps - expected["maps"]).abs() / largest
    return {
        "images": len(scores),
        "score_difference": ((scores - expected["scores"]) / expected["scores"]).abs().max().item(),
        "map_difference": difference.max().item(),
        "pixels_beyond_1e-4": (difference > 1e-4).float().mean().item(),
        "flipped": int(((scores > threshold) != (expected["scores"] > threshold)).sum()),
        "image_auroc": binary_auroc(scores, expected["labels"].long()).item(),
        "pixel_auroc": binary_auroc(maps.flatten(), expected["masks"].flatten().long()).item(),
    }


def time_files(task: Task) -> Result:
    """Time an exported model, and another beside it in turn, on one image of the model's size."""
    image = np.random.default_rng(0).random((1, 3, *task["size"]), dtype=np.float32)
    files = [(task["path"], task.get("precision")), *([task["beside"]] if "beside" in task else [])]
    models = [load(Path(file), precision, task["threads"]) for file, precision in files]
    times = latency([lambda model=model: model(image) for model in models], task["repeats"])
    return dict(zip(("whole_ms", "beside_ms"), times, strict=False))


def time_torch(task: Task) -> Result:
    """Time the trained model in PyTorch, and its backbone alone."""
    model = trained_model(task)
    image = torch.rand(1, 3, *model.input_size)
    network, last = model.model.patch_features.network, image.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        times = latency([lambda: model(image), lambda: network(last)], task["repeats"])
    return dict(zip(("whole_ms", "backbone_ms"), times, strict=True)) | {"size": list(model.input_size)}


def export_random(task: Task) -> Result:
    """Export a model with a random memory bank, to be timed: this package's or anomalib's own."""
    model = without_post_processing(build_model(task).eval())
    size, network = task["size"], model.model
    image = torch.rand(1, 3, size, size)
    with torch.inference_mode():
        if task["side"] == "ours":
            described = network.describe(network.pyramid(image)).flatten(0, 2)
        else:
            described = network.descriptor(list(network.feature_extractor(image).values())).flatten(2)[0].T
    centers = torch.rand(len(described) // task["gamma_c"], described.shape[1]) * described.std()
    if task["side"] == "ours":
        network.assign_bank(centers)
    else:
        network.memory_bank = centers.T.contiguous()
    path = model.to_openvino(Path(task["root"]))
    return {"path": str(path), "bytes": size_on_disk(path)}


MEASUREMENTS: dict[str, Callable[[Task], Result]] = {
    "export": export,
    "reference": reference,
    "agreement": agreement,
    "time_files": time_files,
    "time_torch": time_torch,
    "export_random": export_random,
}

if __name__ == "__main__":
    main()
