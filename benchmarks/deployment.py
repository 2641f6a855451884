"""Does an exported model agree with PyTorch, and how fast is it? Agreement, accuracy, size and time of each export.

Every test image of a set is predicted by a trained model in PyTorch, ONNX Runtime and OpenVINO, in each precision and
compression; times are of one image, beside the model's own backbone. Then this Cfa is timed beside anomalib's own, both
exported with random weights. Finished measurements are kept in ``results/deployment.jsonl``; the table is
``deployment.md`` beside it.

    python benchmarks/deployment.py --ckpt_path MODEL.ckpt --data SET
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.deploy import CompressionType
from anomalib.models import Cfa
from harness import Result, Task, answer, figure, markdown_table, write_report
from harness.arguments import base_parser, file, folder_of_a_set
from harness.images import ImageSet
from harness.models import ANOMALIB_CFA, CFA, build_model
from harness.timing import alternate, limit_threads
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

# Row, OpenVINO's compression, and its inference precision; None leaves that to OpenVINO.
WAYS = {
    "PyTorch": (None, None),
    "ONNX Runtime": (None, None),
    "OpenVINO, float32": (None, "f32"),
    "OpenVINO, the CPU's default": (None, None),
    "OpenVINO, FP16 weights": ("fp16", None),
    "OpenVINO, INT8 weights": ("int8", None),
    "OpenVINO, INT8_PTQ": ("int8_ptq", None),
    "OpenVINO, INT8_ACQ": ("int8_acq", None),
}
Predict = Callable[[Any], dict[str, Any]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = base_parser(__doc__)
    parser.add_argument("--ckpt_path", type=file, required=True, help="a trained model")
    parser.add_argument("--data", type=folder_of_a_set, required=True)
    parser.add_argument("--test-step", type=int, default=1, help="predict only every n-th image, for a quick look")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="repeatable; default: all")
    return parser


def plan(options: argparse.Namespace) -> Iterator[Task]:
    """What there is to measure."""
    for way in options.way or WAYS:
        yield {"label": way, "way": way, "data": options.data.name, "test_step": options.test_step}
    for model in (CFA, ANOMALIB_CFA):
        for precision in ("f32", None):
            task = {"way": "exported", "model": model, "backbone": "resnet18", "size": 256, "precision": precision}
            label = f"{model}, {precision or 'the default precision'}"
            yield {"label": label, **task, **({"side": "anomalib"} if model == ANOMALIB_CFA else {})}


def measure(task: Task) -> Result:
    """Make one measurement."""
    limit_threads(task["threads"])
    return exported(task) if task["way"] == "exported" else of_way(task)


def of_way(task: Task) -> Result:
    """Export the trained model in one way, compare its predictions with PyTorch's, and time it."""
    compression, precision = WAYS[task["way"]]
    model = _trained(task)
    images = ImageSet(Path(task["root"]), test_step=task["test_step"])
    images.setup()
    path = _export(model, task, compression, images)
    predict = load(path, precision, task["threads"]) if path else _predict_in_pytorch(model)
    found, expected, labels, masks = _predictions(predict, _predict_in_pytorch(model), images, model)
    size = model.input_size
    noise = np.random.default_rng(0).random((1, 3, *size), dtype=np.float32)
    whole, backbone = alternate([lambda: predict(noise), _backbone(model, task, path, noise)], repeats=30)
    bytes_ = 0 if path is None else sum(part.stat().st_size for part in path.parent.glob(f"{path.stem}.*"))
    return {**_compare(found, expected, labels, masks, task), "whole_s": whole, "backbone_s": backbone, "bytes": bytes_}


def _trained(task: Task) -> Any:
    """The checkpoint's model; it gives raw scores and maps, before normalization."""
    model = Cfa.load_from_checkpoint(task["ckpt_path"]).eval()
    model.post_processor.enable_normalization = model.post_processor.enable_thresholding = False
    return model


def _export(model: Any, task: Task, compression: str | None, images: ImageSet) -> Path | None:
    root = Path(task["work"])
    if task["way"] == "PyTorch":
        return None
    if task["way"] == "ONNX Runtime":
        path: Path = model.to_onnx(root)
        return path
    needs_images = compression in {"int8_ptq", "int8_acq"}
    return model.to_openvino(  # type: ignore[no-any-return]
        root,
        compression_type=None if compression is None else CompressionType(compression),
        datamodule=images if needs_images else None,
    )


def load(path: Path, precision: str | None, threads: int) -> Predict:
    """A function that maps a batch of images to an exported model's outputs.

    Args:
        path: An ``.onnx`` file for ONNX Runtime, or an ``.xml`` file for OpenVINO on the CPU.
        precision: OpenVINO's inference precision; None leaves the choice to it.
        threads: How many threads it may use.
    """
    if path.suffix == ".onnx":
        import onnxruntime  # noqa: PLC0415 - optional

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options)
        name = session.get_inputs()[0].name
        names = [output.name for output in session.get_outputs()]
        return lambda images: dict(zip(names, session.run(None, {name: images}), strict=True))

    import openvino  # noqa: PLC0415 - optional

    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    config |= {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
    return lambda images: {output.any_name: value for output, value in request.infer([images]).items()}


def _predict_in_pytorch(model: Any) -> Predict:
    @torch.inference_mode()
    def predict(images: Any) -> dict[str, Any]:
        output = model(torch.as_tensor(images))
        return {"pred_score": output.pred_score.numpy(), "anomaly_map": output.anomaly_map.numpy()}

    return predict


def _backbone(model: Any, task: Task, path: Path | None, noise: Any) -> Callable[[], object]:
    """The frozen network alone, in the same runtime, in float32."""
    patch_features, image = model.model.patch_features, torch.from_numpy(noise)
    if path is None:
        return torch.inference_mode()(lambda: patch_features(image))
    file = Path(task["work"], "backbone.onnx")
    torch.onnx.export(
        patch_features.network, (image,), file, dynamo=True, opset_version=18, external_data=False, verbose=False
    )
    if path.suffix == ".xml":
        import openvino  # noqa: PLC0415 - optional

        openvino.save_model(openvino.convert_model(file), file.with_suffix(".xml"), compress_to_fp16=False)
        file = file.with_suffix(".xml")
    predict = load(file, "f32", task["threads"])
    return lambda: predict(noise)


def _predictions(
    predict: Predict,
    reference: Predict,
    images: ImageSet,
    model: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Tensor, Tensor | None]:
    found, expected, labels, masks = [], [], [], []
    for item in images.test_data:
        array = np.ascontiguousarray(item.image[None].numpy(), dtype=np.float32)
        # Copied: a runtime may reuse its outputs' memory.
        found.append({name: value.copy() for name, value in predict(array).items()})
        expected.append(reference(array))
        labels.append(bool(item.gt_label))
        if item.gt_mask is not None:
            _, mask = model.pre_processor.transform(item.image, item.gt_mask)
            masks.append(mask.squeeze() > 0)
    return found, expected, torch.tensor(labels), torch.stack(masks) if masks else None


def _compare(found: Any, expected: Any, labels: Tensor, masks: Tensor | None, task: Task) -> Result:
    scores, wanted_scores = (
        torch.cat([torch.from_numpy(one["pred_score"]).flatten() for one in side]) for side in (found, expected)
    )
    maps, wanted = (torch.cat([torch.from_numpy(one["anomaly_map"]) for one in side]) for side in (found, expected))
    state = torch.load(task["ckpt_path"], weights_only=True)["state_dict"]
    threshold, scale = (
        state["post_processor._image_threshold"],
        state["post_processor.image_max"] - state["post_processor.image_min"],
    )
    difference = (maps - wanted).abs() / wanted.abs().amax(dim=(-2, -1), keepdim=True)
    of_pixels = {}
    if masks is not None:
        of_pixels["pixel_auroc"] = float(binary_auroc((maps / maps.max()).flatten(), masks.flatten().long()))
    return {
        "images": len(scores),
        "score_difference": float(((scores - wanted_scores) / scale).abs().max()),
        "flipped": int(((scores > threshold) != (wanted_scores > threshold)).sum()),
        "pixels_beyond_1e-4": float((difference > 1e-4).float().mean()),
        "image_auroc": float(binary_auroc(scores.double().sigmoid(), labels.long())),
        **of_pixels,
    }


def exported(task: Task) -> Result:
    """Time an exported model, this package's or anomalib's own, with a bank of the default size."""
    model = build_model(task).eval()
    network = model.model
    image = torch.rand(1, 3, task["size"], task["size"])
    with torch.inference_mode():
        if task["model"] == CFA:
            described = network.describe(network.pyramid(image)).flatten(0, 2)
            count = 16384
        else:
            described = network.descriptor(list(network.feature_extractor(image).values())).flatten(2)[0].T
            count = len(described)
    centers = described.mean(dim=0) + described.std() * torch.randn(count, described.shape[1])
    if task["model"] == CFA:
        network.assign_bank(centers)
    else:
        network.memory_bank = centers.T.contiguous()
    predict = load(model.to_openvino(Path(task["work"])), task["precision"], task["threads"])
    noise = image.numpy()
    (seconds,) = alternate([lambda: predict(noise)], repeats=30)
    return {"whole_s": seconds, "centers": count}


def report(runs: Sequence[tuple[Task, Result]], options: argparse.Namespace) -> None:
    """Write the table of finished measurements."""
    if not runs:
        return
    lines, rivals = [], []
    for task, found in runs:
        milliseconds = f"{figure(1e3 * found['whole_s'])} ms"
        if task["way"] == "exported":
            rivals.append([task["label"], str(found["centers"]), milliseconds])
            continue
        behind = (found["whole_s"] - found["backbone_s"]) / found["backbone_s"]
        cells = [f"{found['score_difference']:.0e}", f"{found['flipped']} of {found['images']}"]
        cells += [
            f"{100 * found['pixels_beyond_1e-4']:.3f} %",
            f"{found['image_auroc']:.4f}",
            f"{found['pixel_auroc']:.4f}" if "pixel_auroc" in found else "",
        ]
        cells += [f"{found['bytes'] / 2**20:.1f} MiB" if found["bytes"] else "", milliseconds, f"{behind:.2f}"]
        lines.append([task["way"], *cells])
    head = ["", "score", "labels flipped", "pixels beyond 1e-4", "image AUROC", "pixel AUROC", "on disk", "one image"]
    sections = []
    if lines:
        sections.append(markdown_table([*head, "after the backbone / backbone"], lines))
    if rivals:
        sections += ["## Exported, beside anomalib's own", markdown_table(["", "bank", "one image"], rivals)]
    notes = [
        "the largest differences from PyTorch, before normalization; of scores as a share of their range",
        f"{options.threads} threads; the backbone is timed in the same runtime, in float32",
    ]
    write_report(options.output / "deployment.md", "Deployment", notes, sections, [result for _, result in runs])


if __name__ == "__main__":
    sys.exit(answer("deployment"))
