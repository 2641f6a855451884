"""What does a large bank cost? Time and memory of this Cfa against its backbone, and against anomalib's models.

Building the bank, K-means, a fit, a training step, one image and a batch, over the sizes of bank and images: ratios of
what is measured alternately in one process, or in consecutive processes. Finished measurements are kept in
``results/speed.jsonl``; the tables are ``speed.md`` beside it, and ``speed.png`` shows how time grows with the bank.

    python benchmarks/speed.py --backbone resnet18=FILE [--backbone NAME=FILE]
    python benchmarks/speed.py --backbone resnet18=FILE --quick --device cuda   # on a GPU, under 4 minutes
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import linear_regression, median
from types import SimpleNamespace
from typing import Any

import torch
from harness import Result, Task, answer, figure, markdown_table, write_report
from harness.arguments import Backbones, base_parser
from harness.models import ANOMALIB_CFA, CFA, PATCHCORE_1, build_model
from harness.timing import alternate, now, peak_memory
from matplotlib.figure import Figure

Run = tuple[Task, Result]
TrainStep = Callable[[torch.Tensor], None]
_BATCH = 32


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = base_parser(__doc__)
    parser.add_argument("--backbone", action=Backbones, required=True, metavar="NAME=FILE", help="repeatable")
    parser.add_argument("--what", action="append", choices=MEASUREMENTS, help="repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help="256 x 256 pixels, banks of two sizes, few images")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="repeats of k_means and fit; default: %(default)s")
    return parser


def plan(options: argparse.Namespace) -> Iterator[Task]:
    """What there is to measure."""
    return (task for task in _everything(options) if task["what"] in (options.what or MEASUREMENTS))


def _everything(options: argparse.Namespace) -> Iterator[Task]:
    shared: Task = {"device": options.device, "images": 32 if options.quick and options.device == "cpu" else 100}
    banks = (1024, 16384) if options.quick else (1024, 4096, 16384, 65536)
    for backbone in options.backbone:
        for size in (256,) if options.quick else (256, 512):
            for what, sizes in (("build", (None,)), ("step", banks), ("image", banks)):
                for bank in sizes:
                    task = {**shared, "what": what, "backbone": backbone, "size": size, "bank": bank}
                    if what == "build" and not options.quick:
                        task["images"] = 300
                    yield {"label": f"{what}, {backbone}, {size}, {bank or 'default bank'}", **task}
    for number in range(1 if options.quick else options.rounds):
        rivals = {"k_means": (CFA, ANOMALIB_CFA), "fit": (CFA, ANOMALIB_CFA, PATCHCORE_1)}
        for what, models in rivals.items():
            for model in models if options.device == "cpu" or what == "fit" else ():
                task = {"what": what, "model": model, "backbone": "resnet18", "size": 256, "round": number}
                side = {"side": "anomalib"} if model == ANOMALIB_CFA else {}
                yield {"label": f"{what}, {model}, round {number}", **task, **side, **shared}


def measure(task: Task) -> Result:
    """Make one measurement."""
    torch.manual_seed(0)
    return {**MEASUREMENTS[task["what"]](task), "peak_bytes": peak_memory(task["device"])}


def _model(task: Task, **options: Any) -> Any:
    weights = task["files"].get(task["backbone"])
    model = build_model({"model": CFA, **task, "weights_path": weights, "options": options})
    if hasattr(model.model, "patch_features"):
        model.model.patch_features.load_weights()
    return model.eval().to(task["device"])


def _noise(task: Task, images: int) -> torch.Tensor:
    """Images of smooth noise: neighbouring patches resemble each other, as in real ones."""
    coarse = torch.randn(images, 3, task["size"] // 16, task["size"] // 16)
    smooth = torch.nn.functional.interpolate(coarse, (task["size"], task["size"]), mode="bicubic")
    return (smooth + 0.3 * torch.randn(images, 3, task["size"], task["size"])).to(task["device"])


def _pyramids(network: Any, task: Task) -> list[Any]:
    return [network.pyramid(_noise(task, 4)) for _ in range(task["images"] // 4)]


@torch.inference_mode()
def build(task: Task) -> Result:
    """The backbone's pass over some images, and the bank of their features."""
    network = _model(task).model
    images = [_noise(task, 4) for _ in range(task["images"] // 4)]
    network.pyramid(images[0])
    began = now()
    pyramids = [network.pyramid(batch) for batch in images]
    passed = now()
    network.build(pyramids)
    whole = now() - passed
    return {"backbone_s": passed - began, "bank_s": whole, "centers": len(network.memory_bank.centers)}


def step(task: Task) -> Result:
    """A training step on kept features, with a bank and with one of 1,024 centres, in turn."""
    from anomalib_cfa.loss import CfaLoss  # noqa: PLC0415 - not in the processes of anomalib's

    network, loss = _model(task).model, CfaLoss()
    pyramid = network.pyramid(_noise(task, _BATCH))

    def of_bank(count: int) -> Callable[[], None]:
        bank = copy.deepcopy(network.memory_bank)
        bank.assign(_random_bank(network, pyramid, count))

        def call() -> None:
            network.memory_bank = bank
            for block in network.blocks(pyramid):
                sum(loss(network.targets(block)[0], network.radius)).backward()

        return call

    small, large = alternate([of_bank(1024), of_bank(task["bank"])], repeats=5, warm_up=1)
    return {"small_s": small, "large_s": large}


@torch.inference_mode()
def image(task: Task) -> Result:
    """One image and a batch of 32: the whole model and its backbone alone, in turn."""
    network = _model(task).model
    found = {}
    for name, count in (("one", 1), ("batch", _BATCH)):
        images = _noise(task, count)
        if not network.memory_bank.is_built:
            network.assign_bank(_random_bank(network, network.pyramid(images), task["bank"]))
        calls = [lambda images=images: network(images), lambda images=images: network.patch_features(images)]
        found[f"{name}_s"], found[f"{name}_backbone_s"] = alternate(calls, repeats=30 if count == 1 else 3)
    return found


def _random_bank(network: Any, pyramid: Any, count: int) -> torch.Tensor:
    with torch.no_grad():
        patches = network.describe([level[:4] for level in pyramid]).flatten(0, 2)
        chosen = patches[torch.randint(len(patches), (count,), device=patches.device)]
        return chosen + 0.3 * chosen.std() * torch.randn_like(chosen)


def k_means(task: Task) -> Result:
    """K-means of 16,384 patch features of 128 channels to 4,096 centres, by this package or anomalib's."""
    middles = torch.randn(600, 24)
    points = (middles[torch.randint(600, (16384,))] + torch.randn(16384, 24)) @ torch.randn(24, 128) / 5
    points += 0.1 * torch.randn_like(points)
    if task["model"] == CFA:
        from anomalib_cfa.bank.k_means import k_means as ours  # noqa: PLC0415 - not in anomalib's process

        def cluster() -> torch.Tensor:
            return ours(points, 4096, seed=task["round"])[0]
    else:
        from anomalib.models.components.cluster.kmeans import KMeans  # noqa: PLC0415 - not in this package's

        def cluster() -> torch.Tensor:
            return KMeans(4096, max_iter=3000).fit(points)[1]

    began = now()
    centers = cluster()
    seconds = now() - began
    nearest = torch.cat([torch.cdist(part, centers).amin(dim=1) for part in points.split(1024)])
    return {"seconds": seconds, "inertia": float(nearest.double().square().sum())}


def fit(task: Task) -> Result:
    """A fit of one epoch without Lightning's loops, in batches of 32; then a training step, one image and a batch."""
    model = _model(task)
    network = model.model
    batches = _noise(task, task["images"]).split(_BATCH)
    began = now()
    train_step = _START[task["model"]](model, batches)
    seconds, peak = now() - began, peak_memory(task["device"])
    found = {"fit_s": seconds, "fit_peak_bytes": peak}
    if train_step is not None:
        (found["step_s"],) = alternate([lambda: train_step(batches[0])], repeats=5)
    network.eval()
    with torch.inference_mode():
        calls = [lambda: network(batches[0][:1]), lambda: network(batches[0])]
        (found["one_s"],) = alternate(calls[:1], repeats=20)
        (found["batch_s"],) = alternate(calls[1:], repeats=3)
    return found


def _start_cfa(model: Any, batches: Sequence[torch.Tensor]) -> TrainStep:
    from anomalib_cfa.processes import ALONE  # noqa: PLC0415 - not in the processes of anomalib's
    from anomalib_cfa.training.out_of_bag import OutOfBagScores  # noqa: PLC0415

    network, learn = model.model, _learner(model)
    names = [str(place) for place in range(sum(map(len, batches)))]
    images = [names[place : place + _BATCH] for place in range(0, len(names), _BATCH)]
    kept = [network.pyramid(batch) for batch in batches]
    network.build(kept)
    out_of_bag = OutOfBagScores(network, names, names)
    size = batches[0].shape[-2:]

    def losses_of(pyramid: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for block in network.blocks(pyramid):
            squared, indices, descriptors = network.targets(block)
            network.calibrate(squared.detach(), indices)
            out_of_bag.update(squared.detach(), indices, descriptors.detach())
            yield sum(model.loss(squared, network.radius))

    def train_step(pyramid: Sequence[torch.Tensor], paths: Sequence[str]) -> None:
        out_of_bag.start_batch(paths, size)
        learn(losses_of(pyramid))

    for pyramid, paths in zip(kept, images, strict=True):
        train_step(pyramid, paths)
    network.finish_calibration(ALONE)
    out_of_bag.worst(ALONE)
    return lambda batch: train_step(network.pyramid(batch), images[0])


def _start_anomalib_cfa(model: Any, batches: Sequence[torch.Tensor]) -> TrainStep:
    network, learn = model.model, _learner(model)
    network.initialize_centroid(data_loader=[SimpleNamespace(image=batch) for batch in batches])
    network.train()
    for batch in batches:
        learn([model.loss(network(batch))])
    return lambda batch: learn([model.loss(network(batch))])


def _start_patchcore(model: Any, batches: Sequence[torch.Tensor]) -> None:
    model.model.train()
    for batch in batches:
        model.model(batch)
    model.model.subsample_embedding(sampling_ratio=0.01)


_START = {CFA: _start_cfa, ANOMALIB_CFA: _start_anomalib_cfa, PATCHCORE_1: _start_patchcore}
"""Each fits a model, and returns its training step from images on, if it has one."""


def _learner(model: Any) -> Callable[[Iterable[torch.Tensor]], None]:
    optimizer = model.configure_optimizers()

    def learn(losses: Iterable[torch.Tensor]) -> None:
        optimizer.zero_grad()
        for loss in losses:
            model.backward(loss)  # anomalib's Cfa keeps the graph
        optimizer.step()

    return learn


MEASUREMENTS = {"build": build, "step": step, "image": image, "k_means": k_means, "fit": fit}


def report(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Write the tables and the picture of finished measurements."""
    if not runs:
        return
    sections = [_own_table(runs), _growth(runs), _rivals(runs)]
    if points := [run for run in runs if run[0]["what"] == "image"]:
        draw(points, options.output / "speed.png")
        sections.append("![Time for one image after the backbone](speed.png)")
    notes = [
        f"medians, and ratios of what was measured in turn; {options.threads} threads; device: {options.device}",
        "images of smooth noise; a memory bank of patches like theirs",
    ]
    write_report(options.output / "speed.md", "Speed", notes, sections, [result for _, result in runs])


def _own_table(runs: Sequence[Run]) -> str:
    lines = []
    for task, found in runs:
        place = f"{task['backbone']}, {task['size']} x {task['size']}"
        if task["what"] == "build":
            what = f"{place}: {found['centers']} centres from {task['images']} images / the backbone's pass over them"
            lines.append([what, f"{figure(found['bank_s'])} s", figure(found["bank_s"] / found["backbone_s"])])
        elif task["what"] == "step":
            what = f"{place}: training step with {task['bank']} centres over one with 1,024"
            lines.append([what, f"{figure(found['large_s'])} s", figure(found["large_s"] / found["small_s"])])
        elif task["what"] == "image":
            for name, label in (("one", "one image"), ("batch", "a batch of 32")):
                behind, backbone = _behind(found, name), found[f"{name}_backbone_s"]
                what = f"{place}, {task['bank']} centres: {label}, time after the backbone / the backbone's time"
                lines.append([what, f"{figure(1e3 * found[f'{name}_s'])} ms", figure(behind / backbone)])
    return markdown_table(["", "time", "ratio"], lines)


def _behind(found: Result, name: str = "one") -> float:
    return max(float(found[f"{name}_s"] - found[f"{name}_backbone_s"]), 1e-6)


def _growth(runs: Sequence[Run]) -> str:
    lines = []
    for place in dict.fromkeys((task["backbone"], task["size"]) for task, _ in runs if task["what"] == "image"):
        points = {
            task["bank"]: _behind(found)
            for task, found in runs
            if task["what"] == "image" and (task["backbone"], task["size"]) == place and task["bank"] >= 16384
        }
        if len(points) > 1:
            slope = linear_regression(list(map(math.log, points)), list(map(math.log, points.values()))).slope
            lines.append([f"{place[0]}, {place[1]} x {place[1]}", f"{slope:.2f}"])
    return (
        markdown_table(["from 16,384 to 65,536 centres, time grows as N to the power of", ""], lines) if lines else ""
    )


_RIVALS = {
    ("k_means", "seconds"): "K-means, seconds",
    ("k_means", "inertia"): "K-means, inertia",
    ("fit", "fit_s"): "fit, seconds",
    ("fit", "fit_peak_bytes"): "fit, peak memory in bytes",
    ("fit", "step_s"): "training step of 32 images, seconds",
    ("fit", "one_s"): "one image, seconds",
    ("fit", "batch_s"): "a batch of 32, seconds",
}


def _rivals(runs: Sequence[Run]) -> str:
    lines = []
    for (what, column), title in _RIVALS.items():
        found: dict[str, dict[int, float]] = {}
        for task, result in runs:
            if task["what"] == what and column in result:
                found.setdefault(task["model"], {})[task["round"]] = result[column]
        own = found.pop(CFA, {})
        for model, theirs in found.items():
            if both := sorted(own.keys() & theirs.keys()):
                values = [figure(median(side[number] for number in both)) for side in (own, theirs)]
                ratio = median(theirs[number] / own[number] for number in both)
                lines.append([f"{title}: {model} over this package", *values, figure(ratio)])
    return markdown_table(["", "this package", "the other", "ratio"], lines) if lines else ""


def draw(runs: Sequence[Run], path: Any) -> None:
    """Draw how the time for one image, after the backbone, grows with the bank."""
    chart = Figure(figsize=(6, 4), layout="constrained")
    axes = chart.add_subplot()
    for place in dict.fromkeys((task["backbone"], task["size"]) for task, _ in runs):
        points = [(task["bank"], _behind(found)) for task, found in runs if (task["backbone"], task["size"]) == place]
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=f"{place[0]}, {place[1]} x {place[1]}")
    axes.set(xscale="log", yscale="log", xlabel="centres", ylabel="seconds after the backbone, one image")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    chart.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(answer("speed"))
