"""One measurement of the speed benchmark, made in a process of its own.

``python measure.py TASK RESULT`` reads a JSON file that says what to measure, and writes what was measured to another.
``speed.py`` starts it; whose ``Cfa`` it measures is decided by the environment variable ``ANOMALIB_CFA_REGISTER``.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Cfa
from models import build_model, load_image
from stopwatch import Stopwatch, alternate, peak_memory
from torch import Tensor

Task = dict[str, Any]
Result = dict[str, Any]


def main() -> None:
    """Carry out the task that the command line names."""
    task_file, result_file = map(Path, sys.argv[1:])
    task = json.loads(task_file.read_text())
    torch.set_num_threads(task["threads"])
    if Cfa.__module__.startswith("anomalib_cfa") != (task["side"] == "ours"):
        sys.exit(f"{Cfa.__module__}.Cfa is not the one of {task['side']}")
    result_file.write_text(json.dumps(MEASUREMENTS[task["kind"]](task)))


def fit(task: Task) -> Result:
    """Fit a model through anomalib's engine, without validation."""
    model, watch = build_model(task), Stopwatch(task["batch_size"], task.get("untrained"))
    datamodule = Folder(
        name="speed",
        normal_dir=task["images"],
        train_batch_size=task["batch_size"],
        num_workers=0,
        val_split_mode="none",
        test_split_mode="none",
    )
    engine = Engine(
        accelerator="cpu",
        devices=1,
        max_epochs=task["epochs"],
        max_steps=task.get("steps", -1),
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[watch],
        logger=False,
        enable_progress_bar=False,
        default_root_dir=task["work"],
    )
    began = time.perf_counter()
    engine.fit(model, datamodule=datamodule)
    total = time.perf_counter() - began
    if task.get("state"):
        torch.save(model.state_dict(), task["state"])
    bank = model.model.memory_bank
    return {
        "total_s": total,
        "preparation_s": watch.preparation,
        "steps_s": watch.steps,
        "images": watch.images,
        "peak_bytes": peak_memory(),
        "centers": len(bank.centers) if task["side"] == "ours" else bank.shape[1],
    }


def inference(task: Task) -> Result:
    """Predict one image, and run the frozen backbone alone on it, in turn."""
    model = build_model(task)
    model.load_state_dict(torch.load(task["state"], weights_only=True))
    model.eval()
    image = load_image(model, next(iter(sorted(Path(task["images"]).iterdir()))))
    if task["side"] == "ours":
        backbone, backbone_image = model.model.patch_features.network, image.to(memory_format=torch.channels_last)
    else:
        backbone, backbone_image = model.model.feature_extractor, image
    with torch.inference_mode():
        whole, alone = alternate(
            [lambda: model.model(image), lambda: backbone(backbone_image)], task["repeats"], task.get("warm_up", 3)
        )
    return {"whole_s": median(whole), "backbone_s": median(alone), "all_s": whole, "peak_bytes": peak_memory()}


def k_means(task: Task) -> Result:
    """Cluster a memory bank's points."""
    points = torch.load(task["state"], weights_only=True)["model.memory_bank.centers"]
    cluster = cluster_ours if task["side"] == "ours" else cluster_anomalib
    clusters = len(points) // task["gamma_c"]
    cluster(points[: 4 * 16], 16, 0)  # starts the threads
    began = time.perf_counter()
    centers = cluster(points, clusters, task["round"])
    seconds = time.perf_counter() - began
    nearest = torch.cat([torch.cdist(part.double(), centers.double()).amin(dim=1) for part in points.split(1024)])
    return {"seconds": seconds, "inertia": nearest.square().sum().item(), "points": list(points.shape)}


def cluster_ours(points: Tensor, clusters: int, seed: int) -> Tensor:
    """This package's."""
    from anomalib_cfa.bank.builders import k_means as ours  # noqa: PLC0415 - not in anomalib's process

    return ours(points, clusters, seed)


def cluster_anomalib(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Anomalib's, as its Cfa calls it."""
    from anomalib.models.components.cluster.kmeans import KMeans  # noqa: PLC0415 - not in this package's process

    torch.manual_seed(seed)
    return KMeans(clusters, max_iter=3000).fit(points)[1]


def recall(task: Task) -> Result:
    """Search a memory bank with each kind of index for the patches of images, and compare with brute force."""
    from anomalib_cfa.bank.memory_bank import MemoryBank  # noqa: PLC0415 - not in anomalib's process

    model = build_model(task)
    model.load_state_dict(torch.load(task["state"], weights_only=True))
    model.eval()
    paths = sorted(Path(task["images"]).iterdir())[-task["queries"] :]
    with torch.no_grad():
        batch = torch.cat([load_image(model, path) for path in paths])
        descriptors = model.model.describe(model.model.pyramid(batch)).flatten(0, 2)
    centers, k = model.model.memory_bank.centers, task["k"]
    truth = torch.cat(
        [
            torch.cdist(part.double(), centers.double()).topk(k, largest=False).indices
            for part in descriptors.split(1024)
        ]
    )
    found = {}
    for kind in task["search_kinds"]:
        bank = MemoryBank(kind)
        bank.assign(centers)
        queries = descriptors.detach().requires_grad_()  # a bank searches its index where it is trained against
        began = time.perf_counter()
        bank.nearest(queries[:16], k)
        built = time.perf_counter() - began
        (seconds,) = alternate([partial(bank.nearest, queries, k)], task["repeats"], 1)
        indices = bank.nearest(queries, k)[1]
        hits = (indices[:, :, None] == truth[:, None, :]).any(dim=1).float().mean().item()
        found[kind] = {"seconds": median(seconds), "index_s": built, "recall": hits}
    return {"kinds": found, "queries": len(descriptors), "centers": len(centers)}


def images(task: Task) -> Result:
    """Lay out normal images: some of a folder's, spread evenly, or rendered ones."""
    folder = Path(task["images"])
    folder.mkdir(parents=True)
    if task["source"] is None:
        from anomalib_cfa.demo.render import render_mvtec  # noqa: PLC0415 - not in anomalib's process

        rendered = render_mvtec(folder.parent / "rendered", ["tile"], num_train=task["count"], num_good=1)
        paths = sorted((rendered / "tile/train/good").iterdir())
    else:
        paths = sorted(path for path in Path(task["source"]).iterdir() if path.is_file())
    if len(paths) < task["count"]:
        sys.exit(f"{task['source']} must hold at least {task['count']} images, but holds {len(paths)}")
    step = len(paths) / task["count"]
    for number in range(task["count"]):
        path = paths[int(number * step)]
        shutil.copy(path, folder / f"{number:04}{path.suffix}")
    from anomalib_cfa.benchmark.provenance import machine, versions  # noqa: PLC0415 - not in anomalib's process

    return {"machine": machine("cpu"), "versions": versions()}


MEASUREMENTS: dict[str, Callable[[Task], Result]] = {
    "fit": fit,
    "inference": inference,
    "k_means": k_means,
    "recall": recall,
    "images": images,
}

if __name__ == "__main__":
    main()
